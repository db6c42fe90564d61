package main

import (
	"context"

	"github.com/spf13/cobra"

	"sallyport/gateway/api"
	"sallyport/internal/cli"
)

func (a *app) revocationCommand() *cobra.Command {
	list := &cobra.Command{Use: "list", Short: "List the keys that are not trusted any more, newest first", Args: cli.Exactly(0),
		Long: "List the keys that are not trusted any more, newest first. `in_force` says whether the signed set that RCPs and nodes\n" +
			"keep names the key already. `node revoke`, `node remove` and `rcp remove` put keys on the list; nothing takes one off.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := call(cmd.Context(), a, func(ctx context.Context, c *api.Client) ([]api.Revocation, error) { return c.Revocations(ctx) })
			if err != nil {
				return err
			}
			t := cli.Table{Columns: []string{"revoked", "role", "name", "id", "fingerprint", "in_force", "not_after", "reason"}}
			for _, r := range all {
				inForce := "yes"
				if !r.InForce {
					inForce = "no"
				}
				t.Add(cli.Time(r.Revoked), string(r.Role), r.Name, string(r.ID), r.Fingerprint, inForce, cli.Time(r.NotAfter), r.Reason)
			}
			return a.out.Print(all, t)
		}}
	return cli.Group("revocation", "Keys that are not trusted any more", list)
}
