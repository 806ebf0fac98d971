"""Settings that cannot be combined with adapters: further rules for `config/compatibility.py`."""

from __future__ import annotations

from collections.abc import Sequence

from vlmvqa.config.compatibility import Rule, missing

INSTALL = "install it with: pip install 'vlmvqa[adapters]'"

RULES: Sequence[Rule] = (
    Rule(lambda r: missing("peft"), lambda r: f"adapt={r.adapt.method} needs peft; {INSTALL}"),
    Rule(
        lambda r: r.adapt.bits and missing("bitsandbytes"),
        lambda r: f"adapt={r.adapt.method} needs bitsandbytes; {INSTALL}",
    ),
    Rule(
        lambda r: r.adapt.bits and r.dist.strategy in ("fsdp", "zero3"),
        lambda r: f"adapt.bits={r.adapt.bits}: {r.dist.strategy} cannot shard weights of 4 bits; use dist=ddp or zero2",
    ),
    Rule(
        lambda r: r.dist.strategy == "fsdp" and r.model.dtype != "float32",
        lambda r: (
            f"model.dtype={r.model.dtype} under fsdp, which shards a block in one type, and adapters are float32; "
            "set model.dtype=float32 (trainer.bf16=true still computes in bfloat16)"
        ),
    ),
    Rule(
        # 4-bit layers return the type of their input, and autocast joins no bfloat16 under fp16.
        lambda r: r.adapt.bits and r.trainer.get("fp16") and r.model.dtype == "bfloat16",
        lambda r: (
            "trainer.fp16=true fails with bfloat16 weights next to 4-bit ones; set model.dtype=float32 or float16"
        ),
    ),
    Rule(
        lambda r: r.adapt.bits and r.adapt.compute_dtype == "bfloat16" and not r.bf16_works,
        lambda r: (
            "adapt.compute_dtype=bfloat16: this card does not compute in bfloat16; use adapt.compute_dtype=float16"
        ),
    ),
    Rule(
        lambda r: r.cached and any(target.startswith(("vision", "*")) for target in r.adapt.targets),
        lambda r: "data.feature_cache: an encoder with adapters runs in every step; leave data.feature_cache out",
    ),
)
