"""Other people's routing rules, restated as functions of a request and a snapshot; `routing.policies` names them."""
