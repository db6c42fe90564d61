package cli

import (
	"slices"

	"github.com/spf13/cobra"

	"sallyport/config"
)

// ConfigCommand is `config check` and `config reference`. Without arguments it
// checks the given roles.
func ConfigCommand(out *Output, streams IO, roles ...string) *cobra.Command {
	check := &cobra.Command{
		Use:   "check [ROLE]...",
		Short: "Say what is set, from where, and what it opens",
		Long: "Read the environment as the roles would, start nothing, and say what is in force, where it comes from,\n" +
			"and what it opens, dials and permits. Exits with 2 when a role would refuse to start.",
		ValidArgs: roles,
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				args = roles
			}
			return configCheck(out, streams, args)
		},
	}
	reference := &cobra.Command{
		Use: "reference", Short: "Print the table of all variables, in Markdown", Args: Exactly(0),
		RunE: func(*cobra.Command, []string) error { return out.Raw([]byte(config.Reference())) },
	}
	return Group("config", "Check the configuration", check, reference)
}

func configCheck(out *Output, streams IO, roles []string) error {
	slices.Sort(roles)
	checks, err := config.Check(streams.Env, slices.Compact(roles)...)
	if err != nil {
		return err
	}
	bad := 0
	t := Table{Columns: []string{"role", "what", "value", "from", "note"}}
	for _, c := range checks {
		for _, s := range c.Settings {
			t.Add(c.Role, s.Variable, s.Value, s.Source, s.Doc)
		}
		for _, s := range c.Surface {
			t.Add(c.Role, s.Kind, s.What, s.Variable, s.Who)
		}
		for _, p := range c.Problems {
			t.Add(c.Role, "problem", p, "", "")
			bad++
		}
	}
	if err := out.Print(checks, t); err != nil {
		return err
	}
	if bad > 0 {
		return &ExitError{Code: ExitUsage}
	}
	return nil
}
