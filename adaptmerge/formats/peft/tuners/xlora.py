"""X-LoRA: a classifier that weighs LoRA experts for every token (read to be shown only).

The experts are LoRAs in folders beside it. PEFT 0.21 leaves out the classifier's first layers, whose
numbers it takes for the names of experts; with xlora_depth 1 nothing of it is left.
"""

from __future__ import annotations

from adaptmerge.formats.peft import opaque
from adaptmerge.formats.peft.tuner import Tuner

WHY = (
    "XLORA weighs its experts anew for every token, which no change of weights does: merge the LoRAs in "
    "its folders instead"
)

TUNER = Tuner(
    "XLORA",
    summary="LoRA experts weighed anew for every token",
    read=opaque.read_all("xlora", WHY, "internal_xlora_classifier"),
    maths={
        "hidden_size": None,
        "adapters": None,
        "enable_softmax": True,
        "enable_softmax_topk": False,
        "layerwise_scalings": False,
        "xlora_depth": 1,
        "xlora_size": 2048,
        "softmax_temperature": 1.0,
        "top_k_lora": None,
        "scaling_pass_value": 0.0,
        "global_scaling_weight": 1.0,
    },
    training=frozenset({"xlora_dropout_p", "use_trainable_adapters"}),
    as_lora="never",
    merges="none",
    refused=WHY,
)
