"""Turning a canonical graph into frames."""

from common.frames.build import META_FRAMES, frame_count, frame_id_of, frame_uri, frames
from common.frames.embed_text import LAYOUTS, STATIC_V2
from common.frames.model import Frame

__all__ = ["LAYOUTS", "META_FRAMES", "STATIC_V2", "Frame", "frame_count", "frame_id_of", "frame_uri", "frames"]
