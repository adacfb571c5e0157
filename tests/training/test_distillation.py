"""`ow.distillation_loss`: torch's divergence, with less memory and a gradient for the student alone."""

import pytest
import torch
import torch.nn.functional as F

import openwork as ow
from openwork.training import distillation


def by_torch(student, teacher, temperature=1.0):
    q, p = ((logits / temperature).flatten(0, -2).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="batchmean")


def logits(*shape, dtype=torch.float32):
    student, teacher = 3 * torch.randn(2, *shape)
    return student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()


def gradient_of(loss, student):
    (gradient,) = torch.autograd.grad(loss, student)
    return gradient


@pytest.mark.parametrize("block", [1, 40, 1 << 18])  # logits: a row at a time, two and a short rest, all
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_and_gradient_are_torchs(monkeypatch, block, temperature):
    monkeypatch.setattr(distillation, "_BLOCKS", {"cpu": block})
    student, teacher = logits(3, 5, 17)
    found = 2 * ow.distillation_loss(student, teacher, temperature=temperature)
    wanted = 2 * by_torch(student, teacher, temperature)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert torch.allclose(gradient_of(found, student), gradient_of(wanted, student), atol=1e-7)


def test_the_gradient_is_that_of_finite_differences():
    student, teacher = logits(4, 6, dtype=torch.float64)
    counted = torch.tensor([True, False, True, True])
    assert torch.autograd.gradcheck(
        lambda s: ow.distillation_loss(s, teacher, temperature=1.5, mask=counted), (student,)
    )


def test_the_teacher_gets_no_gradient():
    student, teacher = logits(4, 6)
    ow.distillation_loss(student, teacher).backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


def test_equal_predictions_are_no_distance():
    _, teacher = logits(4, 6)
    student = (teacher + 7).detach().requires_grad_()  # a constant changes no prediction
    loss = ow.distillation_loss(student, teacher)
    assert abs(float(loss.detach())) < 1e-6
    assert gradient_of(loss, student).abs().max() < 1e-6


@pytest.mark.parametrize("junk", [5.0, torch.nan, torch.inf])
def test_only_what_the_mask_counts_has_a_part(junk):
    student, teacher = logits(2, 3, 5)
    counted = torch.tensor([[True, False, True], [False, False, True]])
    with torch.no_grad():
        student[~counted] = junk
    loss = ow.distillation_loss(student, teacher, mask=counted)
    assert float(loss.detach()) == pytest.approx(float(by_torch(student[counted], teacher[counted]).detach()), rel=1e-5)
    gradient = gradient_of(loss, student)
    assert (gradient[~counted] == 0).all()
    assert gradient[counted].isfinite().all()


def test_half_precision_is_computed_in_float32():
    student, teacher = logits(64, 1000, dtype=torch.bfloat16)
    loss = ow.distillation_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(by_torch(student.float(), teacher.float()).detach()), rel=1e-5)
    assert gradient_of(loss, student).dtype == torch.bfloat16


@pytest.mark.parametrize("broken", [0, 1])
def test_a_class_that_the_teacher_rules_out_adds_nothing_and_nan_is_not_hidden(broken):
    pair = [each.detach() for each in logits(2, 5)]
    pair[1][:, 3] = -torch.inf
    assert ow.distillation_loss(*pair).isfinite()
    pair[broken][0, 0] = torch.nan
    assert ow.distillation_loss(*pair).isnan()


@pytest.mark.parametrize(
    ("shapes", "more", "message"),
    [
        (((2, 5), (2, 6)), {}, r"the student's logits are \(2, 5\), the teacher's \(2, 6\); needed equal shapes"),
        (((2, 5), (2, 5)), {"temperature": 0.0}, "temperature is 0.0; it must be greater than 0"),
        (((2, 5), (2, 5)), {"mask": torch.ones(2)}, r"mask is \(2,\) of torch.float32; needed \(2,\) of torch.bool"),
        (((2, 5), (2, 5)), {"mask": torch.zeros(2, dtype=torch.bool)}, "no position counts"),
        (((0, 5), (0, 5)), {}, "no position counts"),
    ],
)
def test_bad_arguments_are_named(shapes, more, message):
    with pytest.raises(ValueError, match=message):
        ow.distillation_loss(*map(torch.zeros, shapes), **more)
