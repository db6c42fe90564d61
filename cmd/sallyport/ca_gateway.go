package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"sallyport/config"
	"sallyport/internal/cli"
	"sallyport/internal/wire"
	"sallyport/pki"
)

// caGatewayCommand is the register of the gateways that a `run pki` works for.
// It works on the files of the authority's host; nobody reaches it over a network.
func (a *app) caGatewayCommand() *cobra.Command {
	return cli.Group("gateway", "The gateways of a CA in a process of its own (run pki), on its host",
		a.caGatewayAddCommand(), a.caGatewayListCommand(), a.caGatewayRemoveCommand())
}

func (a *app) gateways() (*pki.Gateways, error) {
	c, err := config.LoadPKI(a.streams.Env)
	if err != nil {
		return nil, err
	}
	dir := c.Dir("pki")
	switch there, err := pki.Exists(dir); {
	case err != nil:
		return nil, err
	case !there: // a register without an authority is empty, and says nothing of a SALLYPORT_DATA that is mistyped
		return nil, fmt.Errorf("there is no certificate authority in %s: start the authority first, with the same SALLYPORT_DATA", dir)
	}
	return pki.OpenGateways(dir), nil
}

func (a *app) caGatewayAddCommand() *cobra.Command {
	ttl := cli.DurationFlag{Duration: wire.Duration(time.Hour)}
	cmd := &cobra.Command{
		Use: "add [--ttl D]", Short: "Print a code that makes one gateway known to this CA, alone, on stdout", Args: cli.Exactly(0),
		RunE: func(*cobra.Command, []string) error {
			if ttl.Duration <= 0 {
				return cli.Usage("--ttl: want a duration above zero")
			}
			g, err := a.gateways()
			if err != nil {
				return err
			}
			code, until, err := g.Add(time.Duration(ttl.Duration))
			if err != nil {
				return err
			}
			text, err := code.Encode()
			if err != nil {
				return err
			}
			if a.out.Format != cli.FormatTable {
				return a.out.Print(map[string]any{"token_id": code.TokenID, "code": text, "expires": until},
					cli.Table{Columns: []string{"token_id", "code", "expires"}, Rows: [][]string{{code.TokenID, text, cli.Time(until)}}})
			}
			a.out.Note("# for one gateway of %s, until %s. Bring it to the gateway's host in a file (mode 0600) and set there", code.TrustDomain, cli.Time(until))
			a.out.Note("SALLYPORT_GATEWAY_PKI=host:port or /path/of/the.sock")
			a.out.Note("SALLYPORT_GATEWAY_PKI_CODE_FILE=/path/of/that/file")
			return a.out.Raw([]byte(text + "\n"))
		},
	}
	cmd.Flags().Var(&ttl, "ttl", "how long the code may be used")
	return cmd
}

func gatewayTable(all ...pki.Gateway) cli.Table {
	t := cli.Table{Columns: []string{"id", "fingerprint", "added", "until", "removed"}}
	for _, g := range all {
		t.Rows = append(t.Rows, []string{string(g.ID), g.Key.Fingerprint(), cli.Time(g.Added), cli.Time(g.Until), cli.Time(g.Removed)})
	}
	return t
}

func (a *app) caGatewayListCommand() *cobra.Command {
	return &cobra.Command{Use: "list", Short: "List the gateways that this CA knows", Args: cli.Exactly(0),
		RunE: func(*cobra.Command, []string) error {
			g, err := a.gateways()
			if err != nil {
				return err
			}
			all, err := g.List()
			if err != nil {
				return err
			}
			return a.out.Print(append([]pki.Gateway{}, all...), gatewayTable(all...))
		}}
}

func (a *app) caGatewayRemoveCommand() *cobra.Command {
	return &cobra.Command{Use: "remove UUID", Short: "Answer a gateway no more, and revoke its key", Args: cli.Exactly(1),
		Long: "Answer a gateway no more, and revoke its key. The running CA signs it within seconds; nodes and RCPs hear\n" +
			"of it from the gateways that remain.",
		RunE: func(_ *cobra.Command, args []string) error {
			g, err := a.gateways()
			if err != nil {
				return err
			}
			id, err := wire.ParseID(args[0])
			if err != nil {
				return cli.Usage("%w; `sallyport ca gateway list` shows them", err)
			}
			gw, err := g.Remove(id)
			if errors.Is(err, pki.ErrNoGateway) {
				return cli.Fail(cli.ExitNotFound, "%w; `sallyport ca gateway list` shows them", err)
			}
			if err != nil {
				return err
			}
			return a.out.Print(gw, gatewayTable(gw))
		}}
}
