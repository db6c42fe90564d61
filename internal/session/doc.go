// Package session is the end-to-end conversation between the gateway and one
// node or RCP, inside a CONNECT stream whose relays cannot read it: mutually
// authenticated TLS 1.3 in which the gateway is the TLS client and the HTTP/2
// client, and the other party, whoever dialled what below, is the server.
//
// [Dial] and [Serve] are for certified parties. [DialEnroll] and [ServeEnroll]
// are restricted to enrolment: the waiting party is known by its key alone, and
// knows the gateway by the root that its join code pins.
//
// A tunnel ([DialTunnel], [Handlers]) is the same with internal/tunnel in place
// of HTTP/2: streams to targets that the node can reach. It runs in a CONNECT
// stream or on a lane.
//
// Sessions send no keep-alives: the channels below notice dead paths, and an
// idle session must cost nothing. They resume with tickets that stay in memory.
package session
