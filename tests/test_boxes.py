import torch
from hypothesis import given
from hypothesis import strategies as st

from aligndet_hf.boxes import cxcywh_to_xyxy, iou_and_giou, xyxy_to_cxcywh

coordinate = st.floats(-100, 100, width=32)
xyxy = st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), min_size=1, max_size=8).map(
    lambda rows: torch.tensor([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in rows]).double()
)


@given(xyxy)
def test_corner_and_centre_formats_are_inverse(boxes):
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes)


def test_iou_and_giou_by_hand():
    box = torch.tensor([0.0, 0.0, 2.0, 2.0])
    others = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 3.0], [2.0, 0.0, 4.0, 2.0], [3.0, 0.0, 4.0, 2.0]])
    iou, giou = iou_and_giou(box, others)
    torch.testing.assert_close(iou, torch.tensor([1.0, 1 / 7, 0.0, 0.0]))
    torch.testing.assert_close(giou, torch.tensor([1.0, 1 / 7 - 2 / 9, 0.0, -0.25]))


@given(xyxy, xyxy)
def test_giou_is_symmetric_bounded_and_finite_even_for_empty_boxes(first, second):
    iou, giou = iou_and_giou(first[:, None], second[None])
    assert iou.shape == giou.shape == (len(first), len(second))
    assert ((iou >= 0) & (iou <= 1 + 1e-9)).all() and ((giou >= -1 - 1e-9) & (giou <= iou + 1e-9)).all()
    torch.testing.assert_close(iou_and_giou(second[:, None], first[None])[1].T, giou)
