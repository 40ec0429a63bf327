"""Training objectives as values: each names the scores that it needs and gives a weight to each term of the loss.

Every objective is reduced to one fixed weight per log-probability (weights.py); the learner minimises the sum of

    token * (-log p(token)) + divergence * KL + exit * (-log q(exit)) + hazard * s

where the cross-entropy to target hazards may stand for -log q(exit). An objective with ratios, such as PPO's, gives the
weights whose loss has its gradient at the current policy. The registries (ADVANTAGES, KL_TERMS, ...) are
the choices of the settings that select from them; config/ reads them, so nothing here loads torch.
"""
