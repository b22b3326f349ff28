"""Training the selected rows on examples, with TRL's SFTTrainer."""
