"""The study: methods trained on the same examples, and what each learned and forgot."""
