"""Times in milliseconds: measuring a call, and the widths that meet a time."""

import itertools

import pytest
import torch

import rarefy as rf
from rarefy import _core

FULL = 64
GRID = list(range(8, FULL + 1, 8))


def blocks(channels):
    """What a kernel that computes 16 channels at a time takes."""
    return -(-channels // 16) / 4


def convolution(milliseconds, output, inputs):
    """A measured convolution; output and inputs are groups, or None for channels that always stay."""
    outs, ins = ([FULL] if group is None else GRID for group in (output, inputs))
    return _core.pruning.OperatorTime(
        milliseconds=milliseconds,
        output=[] if output is None else [(output, FULL)],
        output_size=FULL,
        outputs=outs,
        input=[] if inputs is None else [(inputs, FULL)],
        input_size=FULL,
        inputs=ins,
        relative=[blocks(o) * blocks(i) for o, i in itertools.product(outs, ins)],
    )


def chain(groups, milliseconds=1.0, rest=0.5, noise=0.03):
    """Convolutions one after the other; group g is what convolution g writes and g + 1 reads."""
    ends = [None, *range(groups), None]
    operators = [convolution(milliseconds, ends[i + 1], ends[i]) for i in range(groups + 1)]
    return _core.pruning.LatencyTable([FULL] * groups, [GRID] * groups, operators, rest=rest, noise=noise)


def ones(groups):
    return [torch.ones(FULL, dtype=torch.float64) for _ in range(groups)]


def lost(scores, widths):
    return sum(float(s.sort().values[: FULL - w].sum()) for s, w in zip(scores, widths, strict=True))


class TestMeasure:
    def test_median_by_a_given_clock(self):
        now, durations = [0.0], iter([9.0, 9.0, 0.001, 0.002, 0.003, 0.004, 0.010])

        def call():
            now[0] += next(durations)

        timing = rf.graph.measure(call, seconds=1e-6, runs=5, warmup=2, clock=lambda: now[0])
        assert timing.milliseconds == pytest.approx(3.0)
        assert timing.spread == pytest.approx(2.0 / 3.0)
        assert timing.runs == 5
        assert timing.threads == torch.get_num_threads()
        assert "3 ms (median of 5" in repr(timing)

    def test_really_measures(self):
        small, large = torch.randn(8, 8), torch.randn(512, 512)
        fast = rf.graph.measure(lambda: small @ small, seconds=0.01)
        slow = rf.graph.measure(lambda: large @ large, seconds=0.01)
        assert 0 < fast.milliseconds < slow.milliseconds

    def test_runs_without_gradients_and_passes_errors_on(self):
        seen = []
        rf.graph.measure(lambda: seen.append(torch.is_grad_enabled()), seconds=1e-6, runs=1, warmup=0)
        assert seen == [False]
        with pytest.raises(ZeroDivisionError):
            rf.graph.measure(lambda: 1 / 0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"seconds": 0.0}, "seconds must be positive, got 0"),
            ({"runs": 0}, "runs must be positive, got 0"),
            ({"warmup": -1}, "warmup must not be negative, got -1"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            rf.graph.measure(lambda: None, **options)


class TestTable:
    def test_predicts_what_was_measured(self):
        table = chain(2)
        assert table.whole == pytest.approx(3.5)
        assert table.predict([FULL, FULL]) == pytest.approx(3.5)
        assert table.predict([32, FULL]) == pytest.approx(0.5 + 0.5 + 0.5 + 1)
        assert table.predict([32, 16]) == pytest.approx(0.5 + 0.5 + 0.125 + 0.25)
        assert table.predict([56, FULL]) == pytest.approx(3.5)  # no step lower; 48 is
        assert table.predict([48, FULL]) == pytest.approx(3.0)
        assert table.predict([52, FULL]) == pytest.approx(3.25)  # between the two

    def test_only_steps_are_useful(self):
        assert _core.pruning.useful_widths(chain(1)) == [[16, 32, 48, 64]]
        assert _core.pruning.useful_widths(chain(1, noise=0.3)) == [[16, 32, 64]]

    def test_sizes_are_checked(self):
        with pytest.raises(ValueError, match="a width for each of the 2 groups, got 1"):
            chain(2).predict([8])
        with pytest.raises(ValueError, match="relative must have 1 values, got 2"):
            _core.pruning.OperatorTime(1.0, [], 8, [8], [], 8, [8], [1.0, 2.0])
        with pytest.raises(ValueError, match="widths for each of the 1 groups, got 0"):
            _core.pruning.LatencyTable([8], [], [])


class TestChoice:
    @pytest.mark.parametrize("share", [0.95, 0.8, 0.6, 0.4, 0.25])
    def test_meets_the_time_at_steps_and_gives_nothing_away(self, share):
        table = chain(4)
        target = share * table.whole
        widths = _core.pruning.widths_for_latency(table, ones(4), target)
        assert table.predict(widths) <= target
        assert all(width % 16 == 0 for width in widths)
        for group, width in enumerate(widths):
            if width < FULL:
                wider = [*widths[:group], width + 16, *widths[group + 1 :]]
                assert table.predict(wider) > target

    @pytest.mark.parametrize("seed", range(5))
    def test_is_close_to_the_best_of_all_widths(self, seed):
        table = chain(3)
        generator = torch.Generator().manual_seed(seed)
        scores = [torch.rand(FULL, generator=generator, dtype=torch.float64) * (1 + g) for g in range(3)]
        total = sum(float(s.sum()) for s in scores)
        for share in (0.8, 0.5):
            target = share * table.whole
            candidates = itertools.product([16, 32, 48, 64], repeat=3)
            best = min(lost(scores, w) for w in candidates if table.predict(list(w)) <= target)
            chosen = _core.pruning.widths_for_latency(table, scores, target)
            assert best <= lost(scores, chosen) <= best + 0.1 * total

    def test_what_matters_least_goes_first(self):
        table = chain(2)
        low, high = torch.ones(FULL), torch.full((FULL,), 10.0)
        assert _core.pruning.widths_for_latency(table, [low, high], 0.8 * table.whole)[1] == FULL
        assert _core.pruning.widths_for_latency(table, [high, low], 0.8 * table.whole)[0] == FULL

    def test_nothing_to_do(self):
        table = chain(2)
        assert _core.pruning.widths_for_latency(table, ones(2), table.whole) == [FULL, FULL]

    @pytest.mark.parametrize(
        ("scores", "target", "message"),
        [
            (ones(2), 0.0, "target must be positive milliseconds, got 0"),
            (ones(2), float("nan"), "target must be positive milliseconds, got nan"),
            (
                ones(2),
                0.6,
                "target must be reachable, got 0.6 ms; the fastest widths are estimated at 1.0625 ms of 3.5 ms",
            ),
            (ones(1), 2.0, "scores for each of the 2 groups, got 1"),
            (
                [torch.ones(FULL), torch.ones(3)],
                2.0,
                r"scores of group 1 must have shape \[64\] \(one per unit\), got \[3\]",
            ),
            ([torch.ones(FULL), torch.full((FULL,), float("inf"))], 2.0, "scores of group 1 must be finite, got inf"),
        ],
    )
    def test_bad_input(self, scores, target, message):
        with pytest.raises(ValueError, match=message):
            _core.pruning.widths_for_latency(chain(2), scores, target)


class TestReach:
    @pytest.mark.parametrize("error", [0.75, 1.0, 1.3])
    @pytest.mark.parametrize("share", [0.85, 0.6, 0.45])
    def test_corrects_a_table_that_is_wrong(self, error, share):
        table = chain(8)
        measured = []

        def measure_pruned(widths):
            measured.append(table.whole - error * (table.whole - table.predict(widths)))  # saves more, or less
            return measured[-1]

        target = share * table.whole
        result = _core.pruning.reach_latency(table, ones(8), target, measure_pruned)
        assert 0.9 * target <= result.measured <= 1.1 * target
        assert result.measured in measured
        assert [one.measured for one in result.tries] == measured
        assert result.target == target
        assert result.before == table.whole
        assert result.threads == torch.get_num_threads()
        assert f"{len(measured)} tr" in repr(result)

    def test_says_the_fastest_time_of_a_target_that_no_try_meets(self):
        with pytest.raises(ValueError, match=r"got 2 ms; the fastest of . tries took 3 ms of 3.5 ms before"):
            _core.pruning.reach_latency(chain(2), ones(2), 2.0, lambda widths: 3.0)

    def test_a_fast_model_is_not_tried(self):
        def never(widths):
            raise AssertionError(widths)

        result = _core.pruning.reach_latency(chain(2), ones(2), 3.5, never)
        assert result.widths == [FULL, FULL]
        assert result.measured == 3.5
        assert result.tries == []

    def test_errors_of_the_caller_pass_through(self):
        def fails(widths):
            raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError, match="out of memory"):
            _core.pruning.reach_latency(chain(2), ones(2), 2.0, fails)

    def test_bad_options(self):
        with pytest.raises(ValueError, match="tries must be positive, got 0"):
            _core.pruning.reach_latency(chain(1), ones(1), 2.0, lambda widths: 1.0, tries=0)
        with pytest.raises(ValueError, match=r"tolerance must be in \(0, 1\), got 1"):
            _core.pruning.reach_latency(chain(1), ones(1), 2.0, lambda widths: 1.0, tolerance=1.0)
