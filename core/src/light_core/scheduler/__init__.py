"""The scheduler: waiting and running requests, admission, and the plan of each step."""

from light_core.scheduler.plan import Admitted, PromptLogprobs, StepPlan
from light_core.scheduler.scheduler import Scheduler

__all__ = ["Admitted", "PromptLogprobs", "Scheduler", "StepPlan"]
