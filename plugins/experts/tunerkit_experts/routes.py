"""Routes: which rows of a batch belong to which expert, and the products of rows with their experts' matrices."""

from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from tunerkit.plugin import AdapterError

# Where `torch.nn.functional.grouped_mm` is ahead of a loop, since the host need not wait for the counts; not measured.
GROUPED_ON = ("cuda",)
_ALIGNED = 16  # bytes: what grouped_mm asks of each stride

Form = Literal["eager", "grouped_mm", "batched_mm"]


class Route:
    """The rows of a batch and their experts. A plain class, since dynamo cannot trace how attrs builds a record.

    Args:
        ids: The expert of each row, (N,) int64; ascending, except in the form "batched_mm".
        count: E, the number of experts.
        form: The implementation of transformers whose products a stack repeats, bit for bit.
    """

    def __init__(self, ids: Tensor, count: int, form: Form = "eager") -> None:
        self.ids, self.count, self.form = ids, count, form
        self._counts: list[int] = []

    @classmethod
    def equal(cls, count: int, rows: Tensor) -> Self:
        """Return the route of ``rows`` (N, ...) of which each of ``count`` experts has the next N / count."""
        each = len(rows) // count
        return cls(torch.arange(count, device=rows.device).repeat_interleave(each, output_size=len(rows)), count)

    @property
    def counts(self) -> list[int]:
        """The number of rows of each expert; on an accelerator, the host waits for them once.

        Raises:
            AdapterError: The rows are not sorted by expert, or an id is not below E.
        """
        if not self._counts:
            counted = torch.bincount(self.ids, minlength=self.count).tolist()
            if len(counted) > self.count or (self.ids.is_cpu and bool((self.ids.diff() < 0).any())):
                raise AdapterError(
                    f"rows must be sorted by expert, from 0 to {self.count - 1}; got {self.ids.tolist()[:8]} and so on"
                )
            self._counts.extend(counted)
        return self._counts

    @property
    def ends(self) -> Tensor:
        """The end of each expert's rows, (E,) int32, without a wait for the device."""
        experts = torch.arange(self.count, device=self.ids.device)
        return torch.searchsorted(self.ids, experts, right=True).to(torch.int32)


def multiply(x: Tensor, w: Tensor, route: Route) -> Tensor:
    """Multiply each row by the matrix of its expert.

    Args:
        x: Rows, (N, in).
        w: The experts' matrices, (E, out, in).
        route: The route of the rows.

    Returns:
        (N, out), in the dtype of the factors, or in autocast's if it is on.
    """
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, w.dtype):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w = x.to(dtype), w.to(dtype)
    if route.form == "batched_mm":  # few rows, not sorted
        return torch.bmm(w[route.ids], x.unsqueeze(-1)).squeeze(-1)
    if _is_grouped(x, w):
        return F.grouped_mm(x, w.mT, offs=route.ends)
    return one_by_one(x, w, route)


def one_by_one(x: Tensor, w: Tensor, route: Route) -> Tensor:
    """Multiply the rows of one expert after the other, as the loop in the experts' own forward does; see `multiply`."""
    parts = zip(x.split(route.counts), w.mT.unbind(), strict=True)
    return torch.cat([part @ matrix for part, matrix in parts])


def _is_grouped(x: Tensor, w: Tensor) -> bool:
    """Whether grouped_mm takes the factors: 16-bit numbers on a device where it is used, in aligned rows."""
    if (
        x.device.type not in GROUPED_ON
        or x.dtype != torch.bfloat16
        or w.dtype != x.dtype
        or not hasattr(F, "grouped_mm")
    ):
        return False
    rows = [*x.stride(), *w.stride(), w.shape[1]]  # the last is that of the output, and of its gradient
    return all(row == 1 or row * x.element_size() % _ALIGNED == 0 for row in rows)
