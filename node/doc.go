// Package node is the agent on a monitored host: it keeps desired state
// applied, runs allowed actions, and keeps events safe until the gateway has
// them.
//
// A node only answers. Its channels serve three requests (CONNECT to its own
// session listener, GET /v1/signals, POST /v1/drain); everything that matters
// is said in end-to-end sessions with a gateway, and signed documents say what
// to do. One process serves several gateways: each has an [instance] in a
// directory of its own, named by trust domain, which shares nothing with the
// others but the host.
//
//	$SALLYPORT_DATA/node/
//	    local.sock
//	    <trust domain>/
//	        identity/      key, chain, trust, revocations, join memory
//	        uid            installation that this instance obeys; delete it to unlock
//	        state.json     lock, drain, name, RCP list
//	        desired.json   last accepted desired state with its verdict
//	        policies/      what was applied and what it replaced
//	        actions/       runs and their output until collected
//	        spool/         events until acknowledged
package node
