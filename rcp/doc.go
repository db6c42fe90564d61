// Package rcp is the relay in the DMZ, or at the edge of a remote site: it
// joins channels and forwards bytes that it cannot read. It has no database, no
// CA and no secret but its own key, and it serves one trust domain.
//
// The side nearer the gateway asks, whoever dialled:
//
//	upstream (gateways, RCPs)    GET /v1/peers, CONNECT, PUT /v1/revocations, POST /v1/drain, /v1/channels, /v1/lanes
//	    │
//	  Relay      table: who is connected, as a stream    roster: their live channels
//	    │
//	downstream (nodes, RCPs)     GET /v1/signals or /v1/peers, CONNECT: see mayAsk, the closed list
//
// What the relay says of its peers is a hint to the gateway; facts are read in
// the sessions that run through it. It starts no connection that its own
// configuration does not name: without dial targets there is no dialler in it.
package rcp
