"""One kernel in one configuration, as its launcher would compile it: what our kernels and the peers' have in common."""

from __future__ import annotations

from dataclasses import dataclass

_FP64 = (
    "exponent_scale", "logit_scale", "softcap", "log2_min_p", "low", "high", "dual_clip", "delta", "tau_positive",
    "tau_negative", "kl_coef", "entropy_coef", "beta", "kl_clamp", "log_ratio_coef", "penalty", "positive", "negative",
    "neutral", "divisor", "max_length", "weight", "scale_a", "scale_b", "rest_a", "rest_b",
)  # fmt: skip
_INT32 = (
    "n_columns", "n_rows", "n_parts", "rows_per_batch", "blocks", "blocks_per_program", "column_stride",
    "out_column_stride",
)  # fmt: skip
_POINTERS = {
    "targets_ptr": "*i64", "offsets_ptr": "*i64", "tokens_ptr": "*i1", "replaced_ptr": "*i1", "selected_ptr": "*i1",
    "eligible_ptr": "*i8",
}  # fmt: skip


_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration; `elements` is what one trip of its longest loop (or one program) handles.

    None: the kernel streams elements of `dtype`, and what a trip loads tells how many it handles.
    Types follow from the arguments' names; `pointers` are those of this kernel that do not. A peer's kernel brings all
    its `types`. `passes` is how often it reads or writes the logits (None: not at all);
    `registers` the most that NVIDIA's compiler may give a thread; `amd_warps` where warps of 64 threads ask for another
    number; `fused` whether it may contract a * b + c.
    """

    name: str
    kernel: object
    constants: dict
    elements: int | None
    dtype: str = "bf16"
    num_warps: int = 4
    types: dict | None = None
    pointers: dict | None = None
    passes: int | None = None
    registers: int | None = None
    amd_warps: int | None = None
    fused: bool = True
    source: str = "ours"

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return _SIZES[self.dtype]

    def bytes_loaded(self, stores: bool) -> int:
        """Bytes a thread loads for an element, in a loop that stores or not: a shifted tile reads its vectors twice."""
        return self.size * (2 if self.constants.get("LOADS") == "shifted" and not stores else 1)

    def signature(self) -> dict[str, str]:
        if self.types is not None:
            return self.types
        given = {**_POINTERS, "logits_ptr": f"*{self.dtype}", "grad_ptr": f"*{self.dtype}", **(self.pointers or {})}

        def kind(name: str) -> str:
            if name in self.constants:
                return "constexpr"
            if name.endswith("_ptr"):
                return given.get(name, "*fp64" if self.dtype == "fp64" else "*fp32")
            return "fp64" if name in _FP64 else "i32" if name in _INT32 else "i64"

        return {name: kind(name) for name in self.kernel.arg_names}
