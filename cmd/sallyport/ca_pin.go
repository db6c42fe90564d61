package main

import (
	"context"

	"github.com/spf13/cobra"

	"sallyport/gateway/api"
	"sallyport/internal/cli"
)

// caPinCommand prints what a host without a join code needs to know.
func (a *app) caPinCommand() *cobra.Command {
	return &cobra.Command{Use: "pin", Short: "Print the fingerprint of the root, for `local csr --ca-pin` on a host that no gateway reaches", Args: cli.Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			pin, err := call(cmd.Context(), a, func(ctx context.Context, c *api.Client) (api.Pin, error) { return c.Pin(ctx) })
			if err != nil {
				return err
			}
			if a.out.Format != cli.FormatTable {
				return a.out.Print(pin, cli.Table{Columns: []string{"root", "trust_domain"}, Rows: [][]string{{pin.Root, pin.TrustDomain}}})
			}
			a.out.Note("# on the host: sallyport local csr request.pem --ca-pin %s --trust-domain %s", pin.Root, pin.TrustDomain)
			return a.out.Raw([]byte(pin.Root + "\n"))
		}}
}
