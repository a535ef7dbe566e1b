"""
Detectors as their authors published them, in small: written for these tests from the papers and the names in published
checkpoints. Only what a forward pass in evaluation mode without padding needs. None of them can detect anything.
"""

import math

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

WIDTH, HEADS, FFN, QUERIES = 64, 8, 96, 7


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, biases and statistics of norms, so that every tensor matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
                tensor.copy_(1 + 0.1 * noise.abs())
            elif tensor.ndim > 1 and "embed" not in name.rsplit(".", 2)[-2]:
                tensor.copy_(noise / math.sqrt(tensor[0].numel()))
            else:
                tensor.copy_(0.3 * noise)
    return model.eval()


class Named(nn.Module):
    """A module that only gives names to others."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


def resnet(name: str = "resnet18", norm=FrozenBatchNorm2d, dilated: bool = False) -> nn.Module:
    dilation = [False, False, dilated]
    body = torchvision.models.get_model(name, norm_layer=norm, replace_stride_with_dilation=dilation)
    del body.fc
    return body


def resnet_maps(body: nn.Module, pixels: Tensor) -> list[Tensor]:
    """Feature maps of strides 4 to 32."""
    maps = [body.maxpool(body.relu(body.bn1(body.conv1(pixels))))]
    for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
        maps.append(stage(maps[-1]))
    return maps[1:]


def sine_position(height: int, width: int, dim: int, temperature: float = 10000, centre: float = 0) -> Tensor:
    """DETR's encoding of places: `[1, dim, height, width]`, rows first."""

    def encode(size: int) -> Tensor:
        place = (torch.arange(1, size + 1) - centre) / (size + 1e-6) * 2 * math.pi
        return interleave(place, dim // 2, temperature)

    rows, columns = encode(height)[:, None].expand(-1, width, -1), encode(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], -1).permute(2, 0, 1)[None]


def interleave(place: Tensor, dim: int, temperature: float = 10000) -> Tensor:
    """Sines and cosines of places at `dim / 2` frequencies, in turns."""
    angle = place[..., None] / temperature ** (2 * torch.arange(dim // 2) / dim)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


def mlp(*sizes: int) -> nn.Module:
    return Named(layers=nn.ModuleList([nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]))


def run_mlp(module: nn.Module, x: Tensor) -> Tensor:
    *first, last = module.layers
    for layer in first:
        x = layer(x).relu()
    return last(x)


def logit(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=1e-5) / (1 - x).clamp(min=1e-5))


# --- DETR ------------------------------------------------------------------------------------------------------------


def layer(**attentions: nn.Module) -> nn.Module:
    norms = {f"norm{i + 1}": nn.LayerNorm(WIDTH) for i in range(len(attentions) + 1)}
    return Named(**attentions, linear1=nn.Linear(WIDTH, FFN), linear2=nn.Linear(FFN, WIDTH), **norms)


def attention() -> nn.Module:
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)


class Detr(nn.Module):
    """facebookresearch/detr: post-norm, zeros as decoder input, queries as positions, norm of the last layer."""

    def __init__(self, num_classes: int = 5, trunk: str = "resnet18", channels: int = 512, dilated: bool = False):
        super().__init__()
        self.backbone = nn.ModuleList([Named(body=resnet(trunk, dilated=dilated))])
        self.input_proj = nn.Conv2d(channels, WIDTH, 1)
        self.query_embed = nn.Embedding(QUERIES, WIDTH)
        self.transformer = self.make_transformer()
        self.class_embed = nn.Linear(WIDTH, num_classes + 1)
        self.bbox_embed = mlp(WIDTH, WIDTH, WIDTH, 4)

    def make_transformer(self) -> nn.Module:
        return Named(
            encoder=Named(layers=nn.ModuleList([layer(self_attn=attention()) for _ in range(2)])),
            decoder=Named(
                layers=nn.ModuleList([layer(self_attn=attention(), multihead_attn=attention()) for _ in range(2)]),
                norm=nn.LayerNorm(WIDTH),
            ),
        )

    def encode(self, pixels: Tensor, temperature: float = 10000) -> tuple[Tensor, Tensor]:
        image = self.input_proj(resnet_maps(self.backbone[0].body, pixels)[-1])
        place = sine_position(*image.shape[-2:], WIDTH, temperature).flatten(2).transpose(1, 2)
        x = image.flatten(2).transpose(1, 2)
        for block in self.transformer.encoder.layers:
            x = self.encoder_layer(block, x, place.expand_as(x))
        return x, place.expand_as(x)

    def encoder_layer(self, block: nn.Module, x: Tensor, place: Tensor) -> Tensor:
        x = block.norm1(x + block.self_attn(x + place, x + place, x)[0])
        return block.norm2(x + block.linear2(block.linear1(x).relu()))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        memory, place = self.encode(pixels)
        query = self.query_embed.weight.expand(len(pixels), -1, -1)
        x = torch.zeros_like(query)
        for block in self.transformer.decoder.layers:
            x = block.norm1(x + block.self_attn(x + query, x + query, x)[0])
            x = block.norm2(x + block.multihead_attn(x + query, memory + place, memory)[0])
            x = block.norm3(x + block.linear2(block.linear1(x).relu()))
        x = self.transformer.decoder.norm(x)
        return self.class_embed(x), run_mlp(self.bbox_embed, x).sigmoid()


# --- Conditional DETR and DAB-DETR -----------------------------------------------------------------------------------


def attend(query: Tensor, key: Tensor, value: Tensor, out: nn.Linear) -> Tensor:
    """Attention whose projections stand outside; keys may be wider than values."""
    query, key, value = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (query, key, value))
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    return out((weights @ value).transpose(1, 2).flatten(2))


def per_head(*parts: Tensor) -> Tensor:
    """Parts side by side within every head."""
    return torch.cat([part.unflatten(-1, (HEADS, -1)) for part in parts], -1).flatten(2)


class ConditionalDetr(Detr):
    """Atten4Vis/ConditionalDETR: content and position apart, positions of queries from reference points."""

    def __init__(self, num_classes: int = 5):
        super().__init__(num_classes - 1)

    def make_transformer(self) -> nn.Module:
        transformer = super().make_transformer()
        decoder = transformer.decoder
        decoder.layers = nn.ModuleList([self.decoder_block(first) for first in (True, False)])
        decoder.query_scale, decoder.ref_point_head = mlp(WIDTH, WIDTH, WIDTH), mlp(WIDTH, WIDTH, 2)
        return transformer

    def decoder_block(self, is_first: bool) -> nn.Module:
        names = (
            "sa_qcontent sa_qpos sa_kcontent sa_kpos sa_v ca_qcontent ca_qpos ca_kcontent ca_kpos ca_v ca_qpos_sine"
        )
        projections = {f"{n}_proj": nn.Linear(WIDTH, WIDTH) for n in names.split() if is_first or n != "ca_qpos"}
        attentions = {n: Named(out_proj=nn.Linear(WIDTH, WIDTH)) for n in ("self_attn", "cross_attn")}
        block = layer(**attentions)
        for name, projection in projections.items():
            setattr(block, name, projection)
        return block

    def decoder_layer(self, block, x, query, sine, memory, place, activation=F.relu) -> Tensor:
        q = block.sa_qcontent_proj(x) + block.sa_qpos_proj(query)
        k = block.sa_kcontent_proj(x) + block.sa_kpos_proj(query)
        x = block.norm1(x + attend(q, k, block.sa_v_proj(x), block.self_attn.out_proj))
        q, k, k_pos = block.ca_qcontent_proj(x), block.ca_kcontent_proj(memory), block.ca_kpos_proj(place)
        if hasattr(block, "ca_qpos_proj"):
            q, k = q + block.ca_qpos_proj(query), k + k_pos
        q, k = per_head(q, block.ca_qpos_sine_proj(sine)), per_head(k, k_pos)
        x = block.norm2(x + attend(q, k, block.ca_v_proj(memory), block.cross_attn.out_proj))
        return block.norm3(x + block.linear2(activation(block.linear1(x))))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        memory, place = self.encode(pixels)
        decoder = self.transformer.decoder
        query = self.query_embed.weight.expand(len(pixels), -1, -1)
        reference = run_mlp(decoder.ref_point_head, query).sigmoid()
        sine = interleave(reference[..., [1, 0]] * 2 * math.pi, WIDTH // 2).flatten(-2)
        x = torch.zeros_like(query)
        for index, block in enumerate(decoder.layers):
            scale = run_mlp(decoder.query_scale, x) if index else 1
            x = self.decoder_layer(block, x, query, sine * scale, memory, place)
        x = decoder.norm(x)
        boxes = run_mlp(self.bbox_embed, x)
        return self.class_embed(x), torch.cat([boxes[..., :2] + logit(reference), boxes[..., 2:]], -1).sigmoid()


class DabDetr(ConditionalDetr):
    """IDEA-Research/DAB-DETR: queries are boxes, refined layer by layer; attention scaled by width and height."""

    def __init__(self, num_classes: int = 5, patterns: int = 0):
        super().__init__(num_classes)
        del self.query_embed
        self.refpoint_embed = nn.Embedding(QUERIES, 4)
        self.transformer.decoder.bbox_embed = self.bbox_embed
        if patterns:
            self.transformer.patterns = nn.Embedding(patterns, WIDTH)

    def make_transformer(self) -> nn.Module:
        transformer = super().make_transformer()
        encoder, decoder = transformer.encoder, transformer.decoder
        encoder.query_scale = mlp(WIDTH, WIDTH, WIDTH)
        decoder.ref_point_head, decoder.ref_anchor_head = mlp(2 * WIDTH, WIDTH, WIDTH), mlp(WIDTH, WIDTH, 2)
        for block in (*encoder.layers, *decoder.layers):
            block.activation = nn.PReLU()
        return transformer

    def encoder_layer(self, block: nn.Module, x: Tensor, place: Tensor) -> Tensor:
        place = place * run_mlp(self.transformer.encoder.query_scale, x)
        x = block.norm1(x + block.self_attn(x + place, x + place, x)[0])
        return block.norm2(x + block.linear2(block.activation(block.linear1(x))))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        memory, place = self.encode(pixels, temperature=20)
        decoder, half = self.transformer.decoder, WIDTH // 2
        boxes = self.refpoint_embed.weight.expand(len(pixels), -1, -1).sigmoid()
        x = torch.zeros(len(pixels), QUERIES, WIDTH)
        if hasattr(self.transformer, "patterns"):
            patterns = self.transformer.patterns.weight
            x = patterns.repeat_interleave(QUERIES, 0).expand(len(pixels), -1, -1)
            boxes = boxes.repeat(1, len(patterns), 1)
        for index, block in enumerate(decoder.layers):
            given = boxes
            sine = interleave(boxes[..., [1, 0, 2, 3]] * 2 * math.pi, half).flatten(-2)
            query = run_mlp(decoder.ref_point_head, sine)
            sine = sine[..., :WIDTH] * (run_mlp(decoder.query_scale, x) if index else 1)
            size = run_mlp(decoder.ref_anchor_head, x).sigmoid()
            by_height, by_width = size[..., 1:] / boxes[..., 3:], size[..., :1] / boxes[..., 2:3]
            sine = torch.cat([sine[..., :half] * by_height, sine[..., half:] * by_width], -1)
            x = self.decoder_layer(block, x, query, sine, memory, place, block.activation)
            boxes = (run_mlp(self.bbox_embed, x) + logit(boxes)).sigmoid()
        x = decoder.norm(x)
        return self.class_embed(x), (run_mlp(self.bbox_embed, x) + logit(given)).sigmoid()


# --- Deformable DETR -------------------------------------------------------------------------------------------------

POINTS = 4


class DeformableAttention(nn.Module):
    def __init__(self, levels: int):
        super().__init__()
        self.sampling_offsets = nn.Linear(WIDTH, HEADS * levels * POINTS * 2)
        self.attention_weights = nn.Linear(WIDTH, HEADS * levels * POINTS)
        self.value_proj, self.output_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, query: Tensor, reference: Tensor, memory: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """Reference points or boxes `[images, queries, 2 or 4]` in the whole image."""
        levels = len(shapes)
        value = self.value_proj(memory).unflatten(-1, (HEADS, -1))
        offsets = self.sampling_offsets(query).unflatten(-1, (HEADS, levels, POINTS, 2))
        weights = self.attention_weights(query).unflatten(-1, (HEADS, levels * POINTS)).softmax(-1)
        where = reference[:, :, None, None, None]
        if reference.shape[-1] == 2:
            sizes = torch.tensor([(width, height) for height, width in shapes])
            where = where + offsets / sizes[:, None]
        else:
            where = where[..., :2] + offsets / POINTS * where[..., 2:] * 0.5
        sampled, maps = [], value.split([height * width for height, width in shapes], 1)
        for level, (shape, one) in enumerate(zip(shapes, maps, strict=True)):
            one = one.permute(0, 2, 3, 1).unflatten(-1, shape).flatten(0, 1)
            grid = 2 * where[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
            sampled.append(F.grid_sample(one, grid, align_corners=False).unflatten(0, (-1, HEADS)))
        sampled = torch.cat(sampled, -1)  # images, heads, channels, queries, levels * points
        mixed = (sampled * weights.permute(0, 2, 1, 3)[:, :, None]).sum(-1)
        return self.output_proj(mixed.flatten(1, 2).transpose(1, 2))


class DeformableDetr(nn.Module):
    """fundamentalvision/Deformable-DETR: plain, with box refinement, in two stages, or on one level."""

    def __init__(self, num_classes: int = 5, refine: bool = False, two_stage: bool = False, levels: int = 4):
        super().__init__()
        self.refine, self.two_stage, self.levels = refine, two_stage, levels
        self.backbone = nn.ModuleList([Named(body=resnet())])
        sizes = [(128, 1), (256, 1), (512, 1), (512, 3)] if levels > 1 else [(512, 1)]
        self.input_proj = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(c, WIDTH, k, stride=k // 2 + 1, padding=k // 2), nn.GroupNorm(32, WIDTH))
                for c, k in sizes
            ]
        )
        blocks = [layer(self_attn=DeformableAttention(levels)) for _ in range(2)]
        decoder = [layer(self_attn=attention(), cross_attn=DeformableAttention(levels)) for _ in range(2)]
        self.transformer = Named(
            encoder=Named(layers=nn.ModuleList(blocks)), decoder=Named(layers=nn.ModuleList(decoder))
        )
        self.transformer.level_embed = nn.Parameter(torch.zeros(levels, WIDTH))
        heads = [(nn.Linear(WIDTH, num_classes), mlp(WIDTH, WIDTH, WIDTH, 4)) for _ in range(3 if refine else 1)]
        heads = heads[: 3 if two_stage else 2] if refine else heads * 2
        self.class_embed = nn.ModuleList([classes for classes, _ in heads])
        self.bbox_embed = nn.ModuleList([boxes for _, boxes in heads])
        if refine:
            self.transformer.decoder.bbox_embed = self.bbox_embed
        if two_stage:
            self.transformer.decoder.class_embed = self.class_embed
            self.transformer.enc_output, self.transformer.enc_output_norm = (
                nn.Linear(WIDTH, WIDTH),
                nn.LayerNorm(WIDTH),
            )
            self.transformer.pos_trans = nn.Linear(2 * WIDTH, 2 * WIDTH)
            self.transformer.pos_trans_norm = nn.LayerNorm(2 * WIDTH)
        else:
            self.query_embed = nn.Embedding(QUERIES, 2 * WIDTH)
            self.transformer.reference_points = nn.Linear(WIDTH, 2)

    def encode(self, pixels: Tensor) -> tuple[Tensor, list[tuple[int, int]], Tensor]:
        maps = resnet_maps(self.backbone[0].body, pixels)[1:]
        maps = [*maps, maps[-1]] if self.levels > 1 else maps[-1:]
        maps = [projection(one) for projection, one in zip(self.input_proj, maps, strict=True)]
        shapes = [tuple(one.shape[-2:]) for one in maps]
        places = [sine_position(*shape, WIDTH, centre=0.5).flatten(2).transpose(1, 2) for shape in shapes]
        place = torch.cat([p + e for p, e in zip(places, self.transformer.level_embed, strict=True)], 1)
        x = torch.cat([one.flatten(2).transpose(1, 2) for one in maps], 1)
        centres = torch.cat([self.centres(*shape) for shape in shapes])[None].expand(len(x), -1, -1)
        for block in self.transformer.encoder.layers:
            x = block.norm1(x + block.self_attn(x + place, centres, x, shapes))
            x = block.norm2(x + block.linear2(block.linear1(x).relu()))
        return x, shapes, centres

    @staticmethod
    def centres(height: int, width: int) -> Tensor:
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        return torch.stack([x / width, y / height], -1).flatten(0, 1)

    def propose(self, memory: Tensor, shapes: list, centres: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes that the encoder proposes, and the queries made of them."""
        t = self.transformer
        size = torch.cat([torch.full((h * w, 2), 0.05 * 2.0**level) for level, (h, w) in enumerate(shapes)])
        boxes = torch.cat([centres, size.expand_as(centres)], -1)
        valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
        boxes = torch.log(boxes / (1 - boxes)).masked_fill(~valid, torch.inf)
        x = t.enc_output_norm(t.enc_output(memory.masked_fill(~valid, 0)))
        best = self.class_embed[-1](x)[..., 0].topk(QUERIES, 1).indices[..., None]
        boxes = (run_mlp(self.bbox_embed[-1], x) + boxes).gather(1, best.expand(-1, -1, 4)).sigmoid()
        sine = interleave(boxes * 2 * math.pi, WIDTH // 2).flatten(-2)
        query, target = t.pos_trans_norm(t.pos_trans(sine)).chunk(2, -1)
        return query, target, boxes

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        memory, shapes, centres = self.encode(pixels)
        if self.two_stage:
            query, x, reference = self.propose(memory, shapes, centres)
        else:
            query, x = (part.expand(len(pixels), -1, -1) for part in self.query_embed.weight.chunk(2, -1))
            reference = self.transformer.reference_points(query).sigmoid()
        for index, block in enumerate(self.transformer.decoder.layers):
            given = reference
            x = block.norm2(x + block.self_attn(x + query, x + query, x)[0])
            x = block.norm1(x + block.cross_attn(x + query, reference, memory, shapes))
            x = block.norm3(x + block.linear2(block.linear1(x).relu()))
            boxes = run_mlp(self.bbox_embed[index], x)
            boxes = torch.cat([boxes[..., : given.shape[-1]] + logit(given), boxes[..., given.shape[-1] :]], -1)
            if self.refine:
                reference = boxes.sigmoid()
        return self.class_embed[index](x), boxes.sigmoid()


# --- mmdet's DETR ----------------------------------------------------------------------------------------------------


class MmdetDetr(nn.Module):
    """DETR with the names of mmdet 2 or 3, computed by DETR's own class of which it shares the tensors."""

    def __init__(self, version: int, num_classes: int = 5):
        super().__init__()
        original = Detr(num_classes)
        original.backbone[0].body = resnet(norm=nn.BatchNorm2d)
        object.__setattr__(self, "original", original)
        names = [("self_attn", "cross_attn"), ("attentions", None)][version == 2]
        encoder = Named(
            layers=nn.ModuleList([self.block(b, names, False) for b in original.transformer.encoder.layers])
        )
        decoder = Named(
            layers=nn.ModuleList([self.block(b, names, True) for b in original.transformer.decoder.layers])
        )
        decoder.post_norm = original.transformer.decoder.norm
        first, second, third = original.bbox_embed.layers
        ffn = Named(layers=nn.Sequential(nn.Sequential(first, nn.ReLU()), second))
        self.backbone = original.backbone[0].body
        self.bbox_head = Named(fc_cls=original.class_embed, reg_ffn=ffn, fc_reg=third)
        if version == 2:
            self.bbox_head.transformer = Named(encoder=encoder, decoder=decoder)
            self.bbox_head.input_proj, self.bbox_head.query_embedding = original.input_proj, original.query_embed
        else:
            self.neck = Named(convs=nn.ModuleList([Named(conv=original.input_proj)]))
            self.encoder, self.decoder, self.query_embedding = encoder, decoder, original.query_embed

    @staticmethod
    def block(block: nn.Module, names: tuple[str, str | None], is_decoder: bool) -> nn.Module:
        attentions = [Named(attn=block.self_attn)] + ([Named(attn=block.multihead_attn)] if is_decoder else [])
        ffn = Named(layers=nn.Sequential(nn.Sequential(block.linear1, nn.ReLU()), block.linear2))
        norms = nn.ModuleList([getattr(block, f"norm{i + 1}") for i in range(len(attentions) + 1)])
        if names[1] is None:
            return Named(attentions=nn.ModuleList(attentions), ffns=nn.ModuleList([ffn]), norms=norms)
        return Named(**dict(zip(names, attentions, strict=False)), ffn=ffn, norms=norms)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.original(pixels)
