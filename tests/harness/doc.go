// Package harness runs Sallyport as an operator does: real programs, each with
// a data directory of its own, on loopback or on the hosts of a network lab.
// Everything is asked through the command line and the public API.
//
//	site := harness.New(t)
//	gateway := site.Gateway()
//	relay := site.RCP(gateway, "dmz-1")
//	node := site.Node(gateway, "web-1")
//	node.WaitRunning(5 * time.Second)
//	gateway.Run("action", "run", "--node", "web-1", "--", "true").Exits(0)
//
// The programs are built once per run. What they logged is shown when the
// test fails. There is no sleep: [Eventually] waits for conditions.
package harness
