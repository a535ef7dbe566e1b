"""
RetinaNet, FCOS and R-CNNs of mmdet and Detectron2 as published, in small, for tests: their names, anchors and regions.
Each gives class probabilities with the classes first, and boxes in pixels, of all anchors or of given regions.
"""

import torch
import torch.nn.functional as F
from original_detectors import Named, resnet, resnet_maps
from torch import Tensor, nn
from torchvision.ops import roi_align

WIDTH, CLASSES = 64, 3
SHAPE = (64, 96)
REGIONS = torch.tensor(
    [[3.0, 5.0, 40.0, 60.0], [10.5, 20.25, 90.0, 50.0], [0.0, 0.0, 95.0, 63.0], [50.0, 8.0, 61, 17]]
)


def conv_module(inputs: int, outputs: int, size: int = 3, stride: int = 1, norm: str | None = None) -> nn.Module:
    """mmdet's: a convolution, which has no bias beside a norm."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=norm is None)
    norms = {"bn": lambda: nn.BatchNorm2d(outputs), "gn": lambda: nn.GroupNorm(32, outputs)}
    return Named(conv=conv, **({norm: norms[norm]()} if norm else {}))


def run(module: nn.Module, x: Tensor) -> Tensor:
    x = module.conv(x)
    for norm in ("bn", "gn"):
        x = getattr(module, norm)(x) if hasattr(module, norm) else x
    return x


def anchors(stride: int, sizes: list[float], shape: tuple[int, int], offset: float = 0) -> Tensor:
    """For each place, each ratio and each size; centres on multiples of the stride."""
    boxes = []
    for ratio in (0.5, 1.0, 2.0):
        for size in sizes:
            width, height = size / ratio**0.5, size * ratio**0.5
            boxes.append([-width / 2, -height / 2, width / 2, height / 2])
    y, x = torch.meshgrid(torch.arange(shape[0]) * stride, torch.arange(shape[1]) * stride, indexing="ij")
    places = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4)
    return (places + torch.tensor(boxes)).reshape(-1, 4)


def decode(boxes: Tensor, deltas: Tensor, stds: tuple[float, ...] = (1, 1, 1, 1)) -> Tensor:
    deltas = deltas * torch.tensor(stds)
    size = boxes[..., 2:] - boxes[..., :2]
    centre = boxes[..., :2] + size / 2 + deltas[..., :2] * size
    size = size * deltas[..., 2:].clamp(max=4.135166556742356).exp()
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def rows(x: Tensor, width: int) -> Tensor:
    """`[images, A * width, h, w]` -> `[images, h * w * A, width]`."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, width)


class MmdetPyramid(nn.Module):
    def __init__(self, channels: list[int], extra: str | None, norm: str | None):
        super().__init__()
        self.lateral_convs = nn.ModuleList([conv_module(c, WIDTH, 1, norm=norm) for c in channels])
        self.fpn_convs = nn.ModuleList([conv_module(WIDTH, WIDTH, norm=norm) for _ in channels])
        self.extra = extra
        if extra:
            first = channels[-1] if extra == "on_input" else WIDTH
            self.fpn_convs += [conv_module(c, WIDTH, stride=2, norm=norm) for c in (first, WIDTH)]

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        laterals = [run(module, one) for module, one in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[-2:])
        found = [run(module, one) for module, one in zip(self.fpn_convs, laterals, strict=False)]
        if self.extra == "on_input":
            found.append(run(self.fpn_convs[3], maps[-1]))
            found.append(run(self.fpn_convs[4], found[-1]))
        elif self.extra == "on_output":
            found.append(run(self.fpn_convs[3], found[-1]))
            found.append(run(self.fpn_convs[4], found[-1].relu()))
        else:
            found.append(F.max_pool2d(found[-1], 1, stride=2))
        return found


def mmdet_trunk() -> nn.Module:
    return resnet(norm=nn.BatchNorm2d)


class MmdetRetinaNet(nn.Module):
    def __init__(self, norm: str | None = None):
        super().__init__()
        self.backbone = mmdet_trunk()
        self.neck = MmdetPyramid([128, 256, 512], "on_input", norm)
        self.bbox_head = Named(
            cls_convs=nn.ModuleList([conv_module(WIDTH, WIDTH) for _ in range(4)]),
            reg_convs=nn.ModuleList([conv_module(WIDTH, WIDTH) for _ in range(4)]),
            retina_cls=nn.Conv2d(WIDTH, 9 * CLASSES, 3, padding=1),
            retina_reg=nn.Conv2d(WIDTH, 36, 3, padding=1),
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        scores, boxes, head = [], [], self.bbox_head
        for level, one in enumerate(self.neck(resnet_maps(self.backbone, pixels)[1:])):
            stride, classes, deltas = 8 * 2**level, one, one
            for of_classes, of_boxes in zip(head.cls_convs, head.reg_convs, strict=True):
                classes, deltas = run(of_classes, classes).relu(), run(of_boxes, deltas).relu()
            scores.append(rows(head.retina_cls(classes), CLASSES).sigmoid())
            own = anchors(stride, [4 * stride * 2 ** (i / 3) for i in range(3)], one.shape[-2:])
            boxes.append(decode(own, rows(head.retina_reg(deltas), 4)))
        return torch.cat(scores, 1), torch.cat(boxes, 1)


class MmdetFcos(nn.Module):
    def __init__(self, norm: str | None = None):
        super().__init__()
        self.backbone = mmdet_trunk()
        self.neck = MmdetPyramid([128, 256, 512], "on_output", norm)
        self.bbox_head = Named(
            cls_convs=nn.ModuleList([conv_module(WIDTH, WIDTH, norm="gn") for _ in range(4)]),
            reg_convs=nn.ModuleList([conv_module(WIDTH, WIDTH, norm="gn") for _ in range(4)]),
            conv_cls=nn.Conv2d(WIDTH, CLASSES, 3, padding=1),
            conv_reg=nn.Conv2d(WIDTH, 4, 3, padding=1),
            conv_centerness=nn.Conv2d(WIDTH, 1, 3, padding=1),
            scales=nn.ModuleList([nn.Module() for _ in range(5)]),
        )
        for scale in self.bbox_head.scales:
            scale.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        scores, boxes, head = [], [], self.bbox_head
        for level, one in enumerate(self.neck(resnet_maps(self.backbone, pixels)[1:])):
            stride, classes, sides = 8 * 2**level, one, one
            for of_classes, of_boxes in zip(head.cls_convs, head.reg_convs, strict=True):
                classes, sides = run(of_classes, classes).relu(), run(of_boxes, sides).relu()
            centerness = rows(head.conv_centerness(classes), 1).sigmoid()
            scores.append(rows(head.conv_cls(classes), CLASSES).sigmoid() * centerness)
            sides = rows((head.scales[level].scale * head.conv_reg(sides)).exp(), 4)
            y, x = torch.meshgrid(*(torch.arange(size) + 0.5 for size in one.shape[-2:]), indexing="ij")
            points = torch.stack([x, y], -1).reshape(-1, 2) * stride
            boxes.append(torch.cat([points - sides[..., :2], points + sides[..., 2:]], -1))
        return torch.cat(scores, 1), torch.cat(boxes, 1)


def pool(maps: list[Tensor], regions: Tensor, size: int) -> Tensor:
    """Regions of one image, each from the level of its size, shifted by half a pixel."""
    side = (regions[:, 2:] - regions[:, :2]).prod(1).sqrt()
    levels = (side / 56 + 1e-6).log2().floor().clamp(0, 3).long()
    found = [
        roi_align(maps[level], [region[None]], size, 1 / (4 * 2**level), sampling_ratio=0, aligned=True)
        for region, level in zip(regions, levels.tolist(), strict=True)
    ]
    return torch.cat(found)


class MmdetRcnn(nn.Module):
    """Faster R-CNN with two full layers, or AlignDet's with four convolutions and one; perhaps with masks."""

    def __init__(self, convs: bool = False, masks: bool = False, norm: str | None = None):
        super().__init__()
        self.backbone = mmdet_trunk()
        self.neck = MmdetPyramid([64, 128, 256, 512], None, norm)
        self.rpn_head = Named(
            rpn_conv=nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            rpn_cls=nn.Conv2d(WIDTH, 3, 1),
            rpn_reg=nn.Conv2d(WIDTH, 12, 1),
        )
        head = Named(
            shared_fcs=nn.ModuleList([nn.Linear(WIDTH * 49, 80)] + ([] if convs else [nn.Linear(80, 80)])),
            fc_cls=nn.Linear(80, CLASSES + 1),
            fc_reg=nn.Linear(80, 4 * CLASSES),
        )
        if convs:
            head.shared_convs = nn.ModuleList([conv_module(WIDTH, WIDTH) for _ in range(4)])
        self.roi_head = Named(bbox_head=head)
        if masks:
            self.roi_head.mask_head = Named(
                convs=nn.ModuleList([conv_module(WIDTH, WIDTH) for _ in range(4)]),
                upsample=nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2),
                conv_logits=nn.Conv2d(WIDTH, CLASSES, 1),
            )

    def maps(self, pixels: Tensor) -> list[Tensor]:
        return self.neck(resnet_maps(self.backbone, pixels))

    def propose(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        scores, boxes = [], []
        for level, one in enumerate(maps):
            x = self.rpn_head.rpn_conv(one).relu()
            scores.append(rows(self.rpn_head.rpn_cls(x), 1).sigmoid())
            own = anchors(4 * 2**level, [32 * 2**level], one.shape[-2:])
            boxes.append(decode(own, rows(self.rpn_head.rpn_reg(x), 4)))
        return torch.cat(scores, 1), torch.cat(boxes, 1)

    def features(self, pooled: Tensor) -> Tensor:
        head = self.roi_head.bbox_head
        for module in getattr(head, "shared_convs", ()):
            pooled = run(module, pooled).relu()
        pooled = pooled.flatten(1)
        for layer in head.shared_fcs:
            pooled = layer(pooled).relu()
        return pooled

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Of the first image: proposals, and what is said of the regions."""
        maps = [one[:1] for one in self.maps(pixels)]
        found = dict(zip(("objectness", "proposals"), self.propose(maps), strict=True))
        x = self.features(pool(maps, REGIONS, 7))
        head = self.roi_head.bbox_head
        found["scores"] = head.fc_cls(x).softmax(-1)[:, :-1]
        deltas = head.fc_reg(x).unflatten(1, (CLASSES, 4))
        found["boxes"] = decode(REGIONS[:, None], deltas, (0.1, 0.1, 0.2, 0.2))
        if hasattr(self.roi_head, "mask_head"):
            mask = self.roi_head.mask_head
            x = pool(maps, REGIONS, 14)
            for module in mask.convs:
                x = run(module, x).relu()
            found["masks"] = mask.conv_logits(mask.upsample(x).relu()).sigmoid()
        return found


class Detectron2Rcnn(nn.Module):
    """Mask R-CNN as SoCo fine-tunes it in Detectron2: norms in trunk, pyramid, box and mask head."""

    def __init__(self):
        super().__init__()
        trunk = resnet(norm=nn.BatchNorm2d)
        object.__setattr__(self, "trunk", trunk)
        stages = {f"res{i + 1}": nn.Sequential(*map(self.block, getattr(trunk, f"layer{i}"))) for i in range(1, 5)}
        self.backbone = Named(bottom_up=Named(stem=Named(conv1=self.normed(trunk.conv1, trunk.bn1)), **stages))
        for level, channels in zip(range(2, 6), (64, 128, 256, 512), strict=True):
            for name, inputs, size in ((f"fpn_lateral{level}", channels, 1), (f"fpn_output{level}", WIDTH, 3)):
                conv = nn.Conv2d(inputs, WIDTH, size, padding=size // 2, bias=False)
                setattr(self.backbone, name, self.normed(conv, nn.BatchNorm2d(WIDTH)))
        self.proposal_generator = Named(
            rpn_head=Named(
                conv=nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
                objectness_logits=nn.Conv2d(WIDTH, 3, 1),
                anchor_deltas=nn.Conv2d(WIDTH, 12, 1),
            )
        )

        def convs(name: str) -> dict[str, nn.Module]:
            made = [nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False) for _ in range(4)]
            return {f"{name}{i + 1}": self.normed(conv, nn.BatchNorm2d(WIDTH)) for i, conv in enumerate(made)}

        self.roi_heads = Named(
            box_head=Named(**convs("conv"), fc1=nn.Linear(WIDTH * 49, 80)),
            box_predictor=Named(cls_score=nn.Linear(80, CLASSES + 1), bbox_pred=nn.Linear(80, 4 * CLASSES)),
            mask_head=Named(
                **convs("mask_fcn"),
                deconv=nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2),
                predictor=nn.Conv2d(WIDTH, CLASSES, 1),
            ),
        )

    @staticmethod
    def normed(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
        conv.norm = norm
        return conv

    def block(self, block: nn.Module) -> nn.Module:
        parts = {"conv1": self.normed(block.conv1, block.bn1), "conv2": self.normed(block.conv2, block.bn2)}
        if block.downsample is not None:
            parts["shortcut"] = self.normed(*block.downsample)
        return Named(**parts)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        backbone, heads, rpn = self.backbone, self.roi_heads, self.proposal_generator.rpn_head
        maps, above = {}, None
        for level, one in reversed(list(enumerate(resnet_maps(self.trunk, pixels[:1]), 2))):
            lateral, output = getattr(backbone, f"fpn_lateral{level}"), getattr(backbone, f"fpn_output{level}")
            one = lateral.norm(lateral(one))
            above = one if above is None else one + F.interpolate(above, scale_factor=2.0)
            maps[level] = output.norm(output(above))
        maps = [maps[level] for level in range(2, 6)]
        maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        found, scores, boxes = {}, [], []
        for level, one in enumerate(maps):
            x = rpn.conv(one).relu()
            scores.append(rows(rpn.objectness_logits(x), 1).sigmoid())
            own = anchors(4 * 2**level, [32 * 2**level], one.shape[-2:])
            boxes.append(decode(own, rows(rpn.anchor_deltas(x), 4)))
        found |= {"objectness": torch.cat(scores, 1), "proposals": torch.cat(boxes, 1)}
        x, masks = pool(maps, REGIONS, 7), pool(maps, REGIONS, 14)
        for i in range(1, 5):
            conv, mask = getattr(heads.box_head, f"conv{i}"), getattr(heads.mask_head, f"mask_fcn{i}")
            x, masks = conv.norm(conv(x)).relu(), mask.norm(mask(masks)).relu()
        x = heads.box_head.fc1(x.flatten(1)).relu()
        found["scores"] = heads.box_predictor.cls_score(x).softmax(-1)[:, :-1]
        deltas = heads.box_predictor.bbox_pred(x).unflatten(1, (CLASSES, 4))
        found["boxes"] = decode(REGIONS[:, None], deltas, (0.1, 0.1, 0.2, 0.2))
        found["masks"] = heads.mask_head.predictor(heads.mask_head.deconv(masks).relu()).sigmoid()
        return found
