"""Torture: every stage of gptjax is disturbed, and its end compared with the undisturbed one to the bit."""
