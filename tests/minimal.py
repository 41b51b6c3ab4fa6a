"""The shortest recipe that composes."""

RECIPE = """\
defaults:
  - model: smollm2-135m
  - method: lora
  - data: reuters-r8
  - task: classification
  - _self_
"""
