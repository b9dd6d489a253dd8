"""ToolForge: multi-hop search dialogues with a few virtual tools, from (question, gold context, answer) triples."""
