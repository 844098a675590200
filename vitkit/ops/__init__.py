"""One file per op: reference, operators, gradient, backend rules, public function."""
