"""Stage 3: implanting: train the selected rows only (LoKI section 3.3), then merge them into the model."""
