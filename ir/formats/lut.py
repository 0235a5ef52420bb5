"""Learned tables: `weight[n, k] = table[n // rows_per_table, code[n, k]] * scale[n]`.

Codes are packed truly (3-bit codes take 3 bits). A table of 8-bit integers costs a byte an entry and makes any table a product of small integers and one
scale a row, which targets expand to plain 8-bit weights without changing a value. An entry that is exactly 0 stays exactly 0.
The idea of one learned table a row is SqueezeLLM's (S. Kim et al., 2023, section 4.1), which keeps its entries in floating point.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ..centroids import fit_tables, nearest_codes
from ..errors import FormatError
from ..rounding import fit, narrow, round_up
from ..spec import option
from .affine import ScaleType
from .base import Payload, TensorSpec, WeightFormat, rows_and_width
from .bitpack import pack, packed_width, unpack

LARGEST = 127  # entries of integer tables lie in [-127, 127]
ENOUGH_ZEROS = 0.1  # share of zeros among a table's weights from which `encode` keeps an entry for them
ENOUGH_SAMPLES = 2**20  # weights that `encode` looks at for one table


class TableType(Enum):
    """Storage type of the tables."""

    INT8 = "int8"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


@dataclass(frozen=True, kw_only=True)
class Lut(WeightFormat):
    """Codes into learned tables of `entries` values; `rows_per_table` consecutive rows share one (None: the whole matrix), the last group may be short."""

    entries: int = option(ge=2, le=256)
    rows_per_table: int | None = option(1, ge=1)
    table: TableType = TableType.INT8
    scale_dtype: ScaleType = ScaleType.FLOAT16

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (self.entries - 1).bit_length()

    @property
    def scaled(self) -> bool:
        """Whether rows have scales: integer tables need them, and rows that share a table differ in size."""
        return self.table is TableType.INT8 or self.rows_per_table != 1

    def tables(self, rows: int) -> int:
        """Number T of tables."""
        return 1 if self.rows_per_table is None else -(-rows // self.rows_per_table)

    def payload_spec(self, rows: int, columns: int, dtype: torch.dtype) -> dict[str, TensorSpec]:
        """`codes: [N, ceil(K*bits/8)] uint8`, `table: [T, E]` in the table type, and `scale: [N, 1]` when rows are scaled."""
        spec = {
            "codes": TensorSpec((rows, packed_width(columns, self.bits)), torch.uint8),
            "table": TensorSpec((self.tables(rows), self.entries), self._table_dtype),
        }
        return spec | ({"scale": TensorSpec((rows, 1), self._scale_dtype)} if self.scaled else {})

    def why_illegal(self, rows: int, columns: int) -> str | None:
        """More rows to a table than there are is refused: it would silently become one table."""
        if self.rows_per_table and self.rows_per_table > rows:
            return f"rows_per_table={self.rows_per_table} is more than the {rows} rows; use rows_per_table <= {rows} or none (one table)"
        return None

    @property
    def takes_prefixes(self) -> bool:
        """Codes of a row are one stream."""
        return True

    def take(self, payload: Payload, rows: int, columns: int, kept: Tensor, width: int) -> dict[str, Tensor]:
        """Prefixes of the streams of codes; of tables that a few rows share only the first ones, whole."""
        shared = self.rows_per_table
        if shared not in (None, 1) and len(kept) < rows and (len(kept) % shared or int(kept.max()) >= len(kept)):
            raise FormatError(f"{self.to_spec()} of [{rows}, {columns}]: {len(kept)} of its rows are no first rows with whole tables; use rows_per_table=1")
        tables = kept if shared == 1 else torch.arange(self.tables(len(kept)))
        parts = {"codes": (kept, packed_width(width, self.bits)), "table": (tables, self.entries), "scale": (kept, 1)}
        return {n: rows_and_width(t, *parts[n]) for n, t in payload.items()}

    def store(self, tables: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """`tables: [T, E] float` and the rows' scales `[N] float` as they are stored: the table in its type, and `[N, 1]` scales or None.

        One table a row takes the scale in (None: ones). An integer table is divided so that its largest entry is 127, and the rows' scales take that up;
        with one table a row they are rounded up, so that the table still fits. Scales of shared tables are not negative; 0 makes a row of exact zeros.
        """
        tables = tables.float()
        if self.rows_per_table == 1:
            return self._store_rows(tables if scale is None else tables * scale.float().unsqueeze(1))
        if scale is None:
            raise FormatError(f"{self.to_spec()}: rows that share a table need their scales, got None; give scale: [N] (ones if the rows are not normalised)")
        scales = scale.float().unsqueeze(1)
        if self.table is TableType.INT8:
            largest = tables.abs().amax(1, keepdim=True)
            scales = scales * self.spread(largest / LARGEST, len(scales))
            tables = tables / torch.where(largest > 0, largest, 1.0) * LARGEST
        stored = torch.where(scales > 0, fit(scales, self._scale_dtype), 0.0)
        return self._cast(tables), stored.to(self._scale_dtype)

    def stored_values(self, tables: Tensor, scale: Tensor | None, rows: int, columns: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """The table and scales of `store`, and the `values: [N, E] f32` that they stand for."""
        table, stored = self.store(tables, scale)
        return table, stored, self.values({"table": table} | ({} if stored is None else {"scale": stored}), rows, columns)

    def _store_rows(self, tables: Tensor) -> tuple[Tensor, Tensor | None]:
        """One table a row: integers with a scale that spans them, or floats without one."""
        if self.table is not TableType.INT8:
            return self._cast(tables), None
        scale = round_up(tables.abs().amax(1, keepdim=True) / LARGEST, self._scale_dtype)
        return self._cast(tables / scale), scale.to(self._scale_dtype)

    def _cast(self, tables: Tensor) -> Tensor:
        if self.table is TableType.INT8:
            return tables.round().clamp_(-LARGEST, LARGEST).to(torch.int8)
        return narrow(tables, self._table_dtype)

    @property
    def _table_dtype(self) -> torch.dtype:
        return getattr(torch, self.table.value)

    @property
    def _scale_dtype(self) -> torch.dtype:
        return getattr(torch, self.scale_dtype.value)

    def spread(self, tables: Tensor, rows: int) -> Tensor:
        """`[T, ...] -> [N, ...]`: what belongs to the table of every row."""
        if self.rows_per_table == 1:
            return tables
        return tables.expand(rows, -1) if self.rows_per_table is None else tables[torch.arange(rows, device=tables.device) // self.rows_per_table]

    def pack(self, codes: Tensor, table: Tensor, scale: Tensor | None) -> dict[str, Tensor]:
        """Payload of codes `[N, K] uint8 below E` with a table and scales as `store` gives them."""
        payload = {"codes": pack(codes, self.bits), "table": table.contiguous()}
        return payload if scale is None else payload | {"scale": scale.contiguous()}

    def values(self, payload: Payload, rows: int, columns: int) -> Tensor:
        """What every code of every row stands for, `[N, E] float32`."""
        values = self.spread(payload["table"].float(), rows)
        return values * payload["scale"].float() if self.scaled else values

    def unpack(self, payload: Payload, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Codes `[N, K] uint8`, and what they stand for, `[N, E] float32`."""
        return unpack(payload["codes"], self.bits, columns), self.values(payload, rows, columns)

    def nearest(self, matrix: Tensor, values: Tensor) -> Tensor:
        """Codes `[N, K] uint8` of the `values: [N, E]` nearest to `matrix: [N, K]`; of two equally near ones the lower code."""
        return nearest_codes(matrix, values)

    def encode(self, matrix: Tensor) -> dict[str, Tensor]:
        """Tables by Lloyd's algorithm on the weights alone; `matrix: [N, K] float`, finite.

        Rows that share a table are divided by their largest magnitude. Where 10 % of a table's weights are exactly 0, they stay so.
        """
        matrix = matrix.float()
        scale = None if self.rows_per_table == 1 else matrix.abs().amax(1)
        normal = matrix if scale is None else matrix / torch.where(scale > 0, scale, 1.0).unsqueeze(1)
        table, stored, values = self.stored_values(self._fit(normal), scale, *matrix.shape)
        return self.pack(self.nearest(matrix, values), table, stored)

    def _fit(self, matrix: Tensor) -> Tensor:
        """Tables `[T, E] float32` of the rows as they share them."""
        rows = matrix.shape[0]
        width = self.rows_per_table or rows
        full = rows // width * width
        parts = [matrix[:full].reshape(full // width, -1), matrix[full:].reshape(1, -1)] if full < rows else [matrix.reshape(rows // width, -1)]
        return torch.cat([self._fit_groups(p) for p in parts])

    def _fit_groups(self, groups: Tensor) -> Tensor:
        """Tables `[T, E]` of `groups: [T, S]`; of very many weights some drawn at random (always the same places) are looked at."""
        pin_zero = (groups == 0).float().mean(1) >= ENOUGH_ZEROS
        if groups.shape[1] > ENOUGH_SAMPLES:
            places = torch.randint(groups.shape[1], (ENOUGH_SAMPLES,), generator=torch.Generator().manual_seed(0), device="cpu")
            groups = groups[:, places.to(groups.device)]
        return fit_tables(groups, self.entries, pin_zero)

    def decode(self, payload: Payload, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """`table[n // rows_per_table, code] * scale[n]`, computed in fp32 and cast to `dtype`."""
        codes, values = self.unpack(payload, rows, columns)
        first = torch.arange(rows, dtype=torch.int32, device=codes.device).unsqueeze(1) * self.entries
        places = (codes.to(torch.int32) + first).flatten()  # 32-bit places in one flat table: six times faster than torch.gather
        return values.flatten().index_select(0, places).reshape(rows, columns).to(dtype)
