"""Embedding APIs: OpenAI, NVIDIA NIM, Voyage AI and Ollama, behind the port of ``common.embedding``."""

from common.embedding.providers.engine import ProviderEmbedder, open_provider
from common.embedding.providers.pace import Patience

__all__ = ["Patience", "ProviderEmbedder", "open_provider"]
