"""What an output holds beside its tensors: the report, a card, files that travel along."""
