"""One kernel in one configuration, as its launcher would compile it: what our kernels and the peers' have in common."""

from __future__ import annotations

from dataclasses import dataclass

_FP64 = (
    "exponent_scale", "logit_scale", "softcap", "log2_min_p", "low", "high", "dual_clip", "delta", "tau_positive",
    "tau_negative", "kl_coef", "entropy_coef", "beta", "positive", "negative", "neutral", "divisor", "max_length",
    "weight", "scale_a", "scale_b", "rest_a", "rest_b",
)  # fmt: skip
_INT32 = ("n_columns", "n_rows", "n_parts", "rows_per_batch", "blocks", "blocks_per_program")
_POINTERS = {
    "targets_ptr": "*i64", "offsets_ptr": "*i64", "tokens_ptr": "*i1", "replaced_ptr": "*i1", "selected_ptr": "*i1",
    "eligible_ptr": "*i8",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration; `elements` is what one trip of its hot loop (or one program) handles.

    Types follow from the arguments' names; `pointers` are those of this kernel that do not. A peer's kernel brings all
    its `types`. `passes` is how often it reads or writes the logits (None: not at all);
    `registers` the most that NVIDIA's compiler may give a thread.
    """

    name: str
    kernel: object
    constants: dict
    elements: int
    dtype: str = "bf16"
    num_warps: int = 4
    types: dict | None = None
    pointers: dict | None = None
    passes: int | None = None
    registers: int | None = None
    source: str = "ours"

    def signature(self) -> dict[str, str]:
        if self.types is not None:
            return self.types
        given = {**_POINTERS, "logits_ptr": f"*{self.dtype}", "grad_ptr": f"*{self.dtype}", **(self.pointers or {})}

        def kind(name: str) -> str:
            if name in self.constants:
                return "constexpr"
            if name.endswith("_ptr"):
                return given.get(name, "*fp32")
            return "fp64" if name in _FP64 else "i32" if name in _INT32 else "i64"

        return {name: kind(name) for name in self.kernel.arg_names}
