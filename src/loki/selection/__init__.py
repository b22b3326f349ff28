"""Stage 2: selecting rows of low contribution, in equal number in every layer (LoKI section 3.2)."""
