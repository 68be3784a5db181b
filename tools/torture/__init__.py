"""Torture: disturbs every stage of gptjax, and compares the result bit by bit with an undisturbed run."""
