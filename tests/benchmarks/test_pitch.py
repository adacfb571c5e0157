"""What the pitch benchmark computes, without its network."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "pretrained"))
from pitch_net import RATE, Block, long_convolution, scores, target, told, tones


@pytest.mark.parametrize("n", [70, 95])
def test_a_long_convolution_is_a_convolution(n):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape).requires_grad_() for shape in ((3, 8, n, 1), (5, 8, 64, 1), (5,)))
    y, expected = long_convolution(x, weight, bias), F.conv2d(x, weight, bias)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    given = torch.randn_like(y)
    found, known = (torch.autograd.grad(out, (x, weight, bias), given) for out in (y, expected))
    torch.testing.assert_close(found, known, atol=1e-3, rtol=1e-4)


def test_a_block_is_the_same_both_ways():
    block, x = Block(torch.nn.Conv2d(8, 4, (64, 1)), (31, 32)).eval(), torch.randn(2, 8, 32, 1)
    expected = block(x)
    block.by_frequency = True
    torch.testing.assert_close(block(x), expected, atol=1e-4, rtol=1e-4)


def test_tones_have_the_pitch_that_they_are_said_to_have():
    frames, cents = tones(64, 3)
    assert torch.equal(frames, tones(64, 3)[0])
    torch.testing.assert_close(frames.std(1), torch.ones(64))
    pitch = 10 * 2 ** (cents / 1200)
    assert pitch.min() >= 55
    assert pitch.max() < 55 * 2**4.1 * 1.005
    time = torch.arange(1024) / RATE
    waves = torch.exp(-2j * math.pi * time * pitch[:, None] * torch.arange(1, 16)[:, None, None]).to(torch.complex64)
    harmonic = (waves * frames).sum(2).abs().square().sum(0)
    between = (waves * torch.exp(-1j * math.pi * time * pitch[:, None]).to(torch.complex64) * frames).sum(2)
    assert (harmonic > 5 * between.abs().square().sum(0)).float().mean() > 0.9


def test_the_pitch_told_is_that_of_the_target():
    cents = torch.linspace(2100, 9000, 50, dtype=torch.float64)
    found = told(torch.logit(target(cents), eps=1e-6))
    assert (found - cents).abs().max() < 1


def test_scores_are_shares_of_frames():
    off = torch.tensor([0.0, 10.0, 30.0, 60.0])
    assert scores(off) == {
        "within_50": 0.75,
        "standard_error": pytest.approx(math.sqrt(0.75 * 0.25 / 4)),
        "within_25": 0.5,
        "median_cents": 10.0,
    }
