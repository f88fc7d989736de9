"""What adapts: strategies, the domains they adapt to, and what keeps them from harm."""
