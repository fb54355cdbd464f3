"""Answers that follow a grammar: compiled beside the steps (`store`), followed token by token (`grammar`), as a mask
over the logits (`mask`, the only file here that needs torch)."""
