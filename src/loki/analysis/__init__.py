"""Stage 1: Knowledge Vector Attribution (LoKI section 3.1), or another score: what each down-projection row is for."""
