"""Plans worth starting a search from: the least summed loss under budgets of summed costs."""
