// Package gateway is the trusted end of Sallyport: who exists, what they
// should do, what they reported.
//
// A [Server] keeps one link to every RCP, or lets RCPs and nodes dial it
// (rcps.go). Over a link it reads the peers stream (peers.go), which it merges
// into the fleet (fleet.go, links.go, presence.go): who hangs where. That is a
// hint and no more. What the gateway decides from, it reads in an end-to-end session with
// the party itself (session.go, visit.go): the hello, events (event.go), the
// results of actions (action.go, runner.go), applied revisions (deploy.go). An RCP that
// lies can therefore keep the gateway from reaching a node, and can do nothing
// else.
//
// Services that nodes can reach are offered by TCP forwards (forward.go) and an
// HTTP relay (relay.go). Both ask the catalog (catalog.go) which node offers a
// target, and reach it by a tunnel (tunnels.go).
//
// Presence is kept in memory; the database sees transitions, and last_seen in
// batches.
package gateway
