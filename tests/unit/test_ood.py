import math

import pytest
import torch

from agent.score.ood import energy


def test_energy_is_minus_the_log_of_the_summed_exponentials():
    logits = torch.tensor([[math.log(1), math.log(2), math.log(5)]])
    assert energy(logits).tolist() == pytest.approx([-math.log(8)])


def test_a_frame_that_nothing_matches_is_stranger():
    known, unknown = energy(torch.tensor([[30.0, 10.0, 9.0], [11.0, 10.0, 9.0]])).tolist()
    assert unknown > known


def test_large_logits_do_not_overflow():
    assert energy(torch.tensor([[500.0, 0.0]])).tolist() == [-500.0]
