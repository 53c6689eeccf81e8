"""One file per family of PEFT adapters, named as its peft_type; each has a constant TUNER."""
