"""Drawing, code by code: the loop, what a code is drawn with, several codes a step."""
