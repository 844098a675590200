"""Rule for diffusers' PatchEmbed (DiT, PixArt, SD3): projection, norm and positions in one pass."""

from __future__ import annotations

from diffusers.models import embeddings as host

from vitkit import nn
from vitkit.patch.patches import must_call_host, onto
from vitkit.patch.rules import Rule

_FORWARD = {"62385eaf46": "0.35 to 0.42"}
_CROPPED = {"0b9e01e0ce": "0.35 to 0.42"}


class PatchEmbed(host.PatchEmbed):
    """diffusers' PatchEmbed on vitkit.patch_embed."""

    def forward(self, latent):
        norm = self.norm if self.layer_norm else None
        if not self.flatten or must_call_host(latent, self.proj, False, norm):
            return super().forward(latent)
        size = tuple(latent.shape[-2:])
        pos = self.pos_embed
        if pos is not None and self.pos_embed_max_size:
            pos = self.cropped_pos_embed(*size)
        elif pos is not None and (self.height, self.width) != tuple(
            s // self.patch_size for s in size
        ):
            return super().forward(latent)  # interpolates
        return nn.patch_embed(
            self, latent, self.proj, norm, pos_embed=None if pos is None else pos[0]
        )


RULES = [
    Rule(
        host.PatchEmbed,
        "patch_embed",
        onto(PatchEmbed, "proj", "norm"),
        (
            (host.PatchEmbed.forward, _FORWARD),
            (host.PatchEmbed.cropped_pos_embed, _CROPPED),
        ),
    )
]
