"""The structure of a network: its layers, their costs, and the channel groups that couple them."""

from autocompress.graph.blocks import Block
from autocompress.graph.groups import ChannelGroup, Member
from autocompress.graph.layers import Layer, LayerKind
from autocompress.graph.trace import NetworkGraph, trace

__all__ = ["Block", "ChannelGroup", "Layer", "LayerKind", "Member", "NetworkGraph", "trace"]
