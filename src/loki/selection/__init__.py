"""Stage 2: selecting rows of low contribution, in equal number in every layer (LoKI section 3.2)."""

from loki.selection.arrays import (
    load_attributions_from_hdf5,
    save_positions_to_json,
    select_trainable_nodes_global_highest,
    select_trainable_nodes_global_lowest,
    select_trainable_nodes_layer_balanced,
)

__all__ = [
    "load_attributions_from_hdf5",
    "save_positions_to_json",
    "select_trainable_nodes_global_highest",
    "select_trainable_nodes_global_lowest",
    "select_trainable_nodes_layer_balanced",
]
