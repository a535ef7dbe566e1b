"""Short names of published detectors. This is the table: one line each, the name and the Hub id."""

import difflib

PUBLISHED = {
    "detr_r50": "facebook/detr-resnet-50",
    "detr_r101": "facebook/detr-resnet-101",
    "table_transformer": "microsoft/table-transformer-detection",
    "conditional_detr_r50": "microsoft/conditional-detr-resnet-50",
    "dab_detr_r50": "IDEA-Research/dab-detr-resnet-50",
    "deformable_detr_r50": "SenseTime/deformable-detr",
    "deformable_detr_r50_refine": "SenseTime/deformable-detr-with-box-refine",
    "deformable_detr_r50_two_stage": "SenseTime/deformable-detr-with-box-refine-two-stage",
    "rt_detr_r18": "PekingU/rtdetr_r18vd",
    "rt_detr_r34": "PekingU/rtdetr_r34vd",
    "rt_detr_r50": "PekingU/rtdetr_r50vd",
    "rt_detr_r101": "PekingU/rtdetr_r101vd",
    "rt_detr_r18_o365": "PekingU/rtdetr_r18vd_coco_o365",
    "rt_detr_r50_o365": "PekingU/rtdetr_r50vd_coco_o365",
    "rt_detr_v2_r18": "PekingU/rtdetr_v2_r18vd",
    "rt_detr_v2_r34": "PekingU/rtdetr_v2_r34vd",
    "rt_detr_v2_r50": "PekingU/rtdetr_v2_r50vd",
    "rt_detr_v2_r101": "PekingU/rtdetr_v2_r101vd",
    "d_fine_n": "ustc-community/dfine-nano-coco",
    "d_fine_s": "ustc-community/dfine-small-coco",
    "d_fine_l": "ustc-community/dfine-large-coco",
    "d_fine_x": "ustc-community/dfine-xlarge-coco",
    "lw_detr_s": "AnnaZhang/lwdetr_small_60e_coco",
    "rf_detr_n": "Roboflow/rf-detr-nano",
    "rf_detr_b": "Roboflow/rf-detr-base",
    "yolos_t": "hustvl/yolos-tiny",
    "yolos_s": "hustvl/yolos-small",
    "yolos_b": "hustvl/yolos-base",
}


def hub_id(name: str) -> str:
    """
    The Hub id of a short name; what is none stays as it is.

    Raises:
        `ValueError`: it is nearly a short name.
    """
    if name in PUBLISHED or "/" in name:
        return PUBLISHED.get(name, name)
    if close := difflib.get_close_matches(name, PUBLISHED, 1, 0.85):
        raise ValueError(f"there is no detector {name!r}; did you mean {close[0]!r}? docs/families.md has all names")
    return name
