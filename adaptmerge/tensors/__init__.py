"""A tensor described now, read later."""
