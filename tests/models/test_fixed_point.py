"""Numbers in dynamic fixed point: products are exact, rounding is small and fair."""

import math
from fractions import Fraction

import pytest
import torch

import lnfree_interp as lf
from lnfree_interp.errors import DataError
from lnfree_interp.models import fixed_point as module
from lnfree_interp.models.fixed_point import FixedPoint, has_integer_kernel

BITS = pytest.mark.parametrize("bits", [2, 8, 10, 12, 16])


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact_product(a, b):
    """By fractions: each entry rounded once, to float64."""
    rows, columns = a.integers.tolist(), b.integers.T.tolist()
    factor = Fraction(2) ** (a.exponent + b.exponent)

    def rounded(total):
        try:
            return float(total * factor)
        except OverflowError:
            return math.inf if total > 0 else -math.inf

    return torch.tensor(
        [[rounded(sum(x * y for x, y in zip(row, column, strict=True))) for column in columns]
         for row in rows],
        dtype=torch.float64,
    )  # fmt: skip


class TestProducts:
    @BITS
    @pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 3), (5, 1, 2), (40, 64, 1), (33, 129, 50)])
    @pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
    def test_are_those_of_what_the_integers_stand_for(self, bits, shape, turned):
        m, k, n = shape
        x = normal(k, m).T if turned[0] else normal(m, k)
        W = normal(n, k, seed=1).T if turned[1] else normal(k, n, seed=1)
        a, b = lf.fixed_point(3 * x, bits), lf.fixed_point(0.01 * W, bits)
        expected = a.value.double() @ b.value.double()
        assert ((a @ b).double() - expected.float().double()).abs().max() == 0.0
        wrong = FixedPoint(a.integers.clone(), a.exponent, bits, a.dtype)
        wrong.integers[0, 0] += 1
        assert bits == 2 or not torch.equal(wrong @ b, a @ b)

    @BITS
    @pytest.mark.parametrize(
        ("dtype", "sizes"),
        [
            (torch.float32, (1e-44, 1e-44)), (torch.float32, (1e-44, 1e38)),
            (torch.float32, (1e38, 3e38)), (torch.float32, (1e-20, 1e-25)),
            (torch.float64, (5e-324, 1.0)), (torch.float64, (1e-300, 1e300)),
            (torch.float64, (1e-160, 1e-160)), (torch.float64, (1e300, 1e8)),
            (torch.float64, (1e300, 1e10)),
        ],
    )  # fmt: skip
    def test_are_rounded_once_at_extreme_exponents(self, bits, dtype, sizes):
        x, W = (
            size * normal(*shape, seed=seed, dtype=torch.float64).clamp(-1, 1)
            for seed, (size, shape) in enumerate(zip(sizes, [(4, 9), (9, 5)], strict=True))
        )
        a, b = lf.fixed_point(x.to(dtype), bits), lf.fixed_point(W.to(dtype), bits)
        assert torch.equal(a @ b, exact_product(a, b).to(dtype))

    @BITS
    def test_of_long_sums_are_exact(self, bits, monkeypatch):
        largest = lf.fixed_point(torch.full((2, 2**17 + 5), 1.0), bits)
        expected = (2**17 + 5) * int(largest.integers[0, 0]) ** 2 * 4.0**largest.exponent
        assert (largest @ largest.T)[0, 0].item() == torch.tensor(expected).item()
        monkeypatch.setattr(module, "_INT32_TERMS", 10)
        monkeypatch.setattr(module, "_FLOAT64", 2 * bits + 1)  # 8 terms at once
        a, b = lf.fixed_point(normal(6, 47), bits), lf.fixed_point(normal(47, 5), bits)
        assert torch.equal(a @ b, (a.value.double() @ b.value.double()).float())

    def test_are_the_kernels_where_there_is_one(self, monkeypatch):
        a, b = lf.fixed_point(normal(20, 30), 8), lf.fixed_point(normal(30, 10), 8)
        found, kernel, asked = a @ b, torch._int_mm, []
        for there in (True, False):
            monkeypatch.setattr(module, "has_integer_kernel", lambda device, there=there: there)
            monkeypatch.setattr(torch, "_int_mm", lambda x, y: asked.append(1) or kernel(x, y))
            assert torch.equal(a @ b, found)
            assert len(asked) == 1

    @pytest.mark.parametrize("wrong", ["absent", "refuses", "wrong"])
    def test_are_simulated_where_the_kernel_is_not_right(self, wrong, monkeypatch):
        def kernel(x, y):
            if wrong == "refuses":
                raise RuntimeError("not implemented for this device")
            return (x.double() @ y.double()).int().T.contiguous().T + (len(x) == 40)

        has_integer_kernel.cache_clear()
        if wrong == "absent":
            monkeypatch.delattr(torch, "_int_mm")
        else:
            monkeypatch.setattr(torch, "_int_mm", kernel)
        assert not has_integer_kernel("cpu")
        a, b = lf.fixed_point(normal(40, 30), 8), lf.fixed_point(normal(30, 10), 8)
        assert torch.equal(a @ b, (a.value.double() @ b.value.double()).float())
        has_integer_kernel.cache_clear()

    @pytest.mark.parametrize(
        ("bits", "error"), [(8, 1.3e-2), (10, 3.3e-3), (12, 8.0e-4), (16, 5.1e-5)]
    )
    def test_have_the_errors_of_their_width(self, bits, error):
        # The largest entries are between 2 and 4; beyond 4 the steps are twice as wide.
        x, W = normal(64, 256).clamp(-3.9, 3.9), normal(256, 64, seed=1).clamp(-3.9, 3.9)
        exact = x.double() @ W.double()

        def measured(bits):
            found = (lf.fixed_point(x, bits) @ lf.fixed_point(W, bits)).double()
            return ((found - exact).norm() / exact.norm()).item()

        assert measured(bits) == pytest.approx(error, rel=0.1)
        assert measured(bits - 1) / measured(bits) == pytest.approx(2, rel=0.1)


class TestRounding:
    @BITS
    def test_is_off_by_half_a_step_at_most(self, bits):
        x = normal(1000, dtype=torch.float64)
        q = lf.fixed_point(x, bits)
        assert (q.value - x).abs().max() <= 2.0**q.exponent / 2
        assert q.integers.abs().max() <= 2 ** (bits - 1) - 1

    @BITS
    @pytest.mark.parametrize("share", [0.5, 0.75, 0.999, 1.0, 1.001])
    def test_has_the_smallest_exponent_without_clipping(self, bits, share):
        """Just below and just above the largest integer."""
        limit = 2 ** (bits - 1) - 1
        q = lf.fixed_point(torch.tensor([0.1, -limit * share], dtype=torch.float64), bits)
        assert limit * share <= limit * 2.0**q.exponent
        assert limit * share > limit * 2.0 ** (q.exponent - 1)

    @BITS
    def test_leaves_what_can_be_represented(self, bits):
        limit = 2 ** (bits - 1) - 1
        x = torch.arange(-limit, limit + 1) * 2.0**-20
        for generator in (None, torch.Generator().manual_seed(0)):
            q = lf.fixed_point(x, bits, generator)
            assert q.exponent == -20
            assert torch.equal(q.value, x)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_of_gradients_has_the_entry_as_its_mean(self, dtype):
        """Within 5 standard errors of 4000 draws, for each of 200 entries; to the nearest it is
        not."""
        x, draws = normal(200, dtype=dtype), 4000
        generator = torch.Generator().manual_seed(0)
        found = torch.stack([lf.fixed_point(x, 4, generator).value for _ in range(draws)]).double()
        step = 2.0 ** lf.fixed_point(x, 4).exponent
        x = x.double()
        share = x / step - (x / step).floor()
        standard_error = step * (share * (1 - share) / draws).sqrt()
        assert ((found - x).abs() < step).all()
        assert ((found.mean(0) - x).abs() <= 5 * standard_error + step * 2.0**-24).all()
        nearest = lf.fixed_point(x, 4).value
        assert ((nearest - x).abs() > 5 * standard_error).sum() > 100

    def test_is_drawn_by_the_seed(self):
        x = normal(500)
        one, same, other = (
            lf.fixed_point(x, 8, torch.Generator().manual_seed(seed)).integers for seed in (0, 0, 1)
        )
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    @pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
    def test_of_what_is_not_finite_is_not_a_number(self, wrong):
        x = normal(4, 5)
        x[2, 3] = wrong
        for generator in (None, torch.Generator()):
            q = lf.fixed_point(x, 8, generator)
            assert q.exponent is None
            good = lf.fixed_point(normal(5, 5), 8)
            rows = torch.tensor([0, 1, 1, 2])
            for found in (q.value, q @ good, good[:, :4] @ q, q.sum(0), q.rows_added(rows, 3)):
                assert found.isnan().all()

    @pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.zeros(0, 4), torch.tensor(0.0)])
    def test_of_nothing_is_nothing(self, x):
        for generator in (None, torch.Generator()):
            assert torch.equal(lf.fixed_point(x, 8, generator).value, x)

    def test_of_subnormal_numbers_is_exact(self):
        x = torch.tensor([1e-45, -3e-45, 9e-44])
        assert torch.equal(lf.fixed_point(x, 8).value, x)
        assert (x != 0).all()

    def test_of_half_precision_gives_it_back(self):
        x = normal(50).bfloat16()
        q, same = lf.fixed_point(x, 8), lf.fixed_point(x.float(), 8)
        assert torch.equal(q.integers, same.integers)
        assert q.value.dtype == torch.bfloat16
        assert torch.equal(q.value.float(), same.value)

    @pytest.mark.parametrize("bits", [1, 17, 32])
    def test_to_a_width_that_is_none_is_refused(self, bits):
        with pytest.raises(DataError, match=f"integers of {bits} bits: give 2 to 16"):
            lf.fixed_point(torch.ones(2), bits)


class TestSums:
    @BITS
    def test_are_exact(self, bits):
        q = lf.fixed_point(normal(500, 3), bits)
        assert torch.equal(q.sum(0), q.value.double().sum(0).float())

    @BITS
    @pytest.mark.parametrize("n", [1, 7, 2**16 + 1])
    def test_of_rows_are_exact(self, bits, n):
        """The longest needs int64 at 16 bits."""
        q = lf.fixed_point(normal(2**16 + 1, 1).abs() + 100, bits)
        rows = torch.arange(len(q.integers)) % n
        expected = torch.zeros(n, 1, dtype=torch.float64).index_add_(0, rows, q.value.double())
        assert torch.equal(q.rows_added(rows, n), expected.float())
