"""Agent attention: a few agent tokens read the keys, and the queries read the agents."""

from lcattn.ops.agent_attention.agents import pooled_agents
from lcattn.ops.agent_attention.api import agent_attention
from lcattn.ops.agent_attention.state import AgentAttentionState, agent_attention_state

__all__ = ["AgentAttentionState", "agent_attention", "agent_attention_state", "pooled_agents"]
