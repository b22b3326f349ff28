"""Stage 1: Knowledge Vector Attribution (LoKI section 3.1): what each down-projection row contributes."""
