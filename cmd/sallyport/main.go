// Command sallyport is every role and the operator's tool in one program: run
// a gateway, an RCP or a node, and ask a gateway over its API.
package main

import (
	"os"

	"github.com/spf13/cobra"

	"sallyport/internal/cli"
	"sallyport/internal/wire"
)

func main() {
	streams := cli.Standard()
	os.Exit(cli.Main(newRoot(streams), streams, os.Args[1:]))
}

// newRoot builds the command tree. Nothing is dialled or opened before a
// command runs.
func newRoot(streams cli.IO) *cobra.Command {
	a := &app{streams: streams, out: cli.NewOutput(streams)}
	root := cli.Root("sallyport", "A reverse channel proxy for networks that allow outbound connections only",
		"Sallyport manages nodes in networks that nobody can dial into.\n\n"+
			"Try `sallyport demo`: a gateway, an RCP and three nodes on this machine.\n"+
			"`sallyport run gateway`, `run rcp` and `run node` start the roles; `sallyport config check` says\n"+
			"what the environment makes of them. Everything else asks a running gateway.", streams)
	a.out.AddFlag(root)
	root.AddCommand(
		a.runCommand(), a.demoCommand(), a.simCommand(), a.backupCommand(), a.restoreCommand(),
		a.applyCommand(), a.rcpCommand(), a.joinCommand(), a.requestCommand(), a.ruleCommand(), a.certificateCommand(), a.nodeCommand(), a.policyCommand(),
		a.deploymentCommand(), a.actionCommand(), a.targetCommand(), a.eventCommand(), a.tokenCommand(), a.auditCommand(), a.revocationCommand(), a.caCommand(),
		cli.LocalCommand(a.out, streams, gatewayStopped, wire.RoleNode, wire.RoleRCP, wire.RoleGateway),
		cli.ConfigCommand(a.out, streams, "gateway", "rcp", "node", "pki", "signer", "operator"),
		cli.VersionCommand(a.out),
	)
	explainErrors(root)
	return root
}
