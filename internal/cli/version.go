package cli

import (
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"sallyport/internal/wire"
)

// BuildVersion names this build: the module's version when it was built from
// one, otherwise "devel" with the commit.
func BuildVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "devel"
	}
	return versionOf(info)
}

func versionOf(info *debug.BuildInfo) string {
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	version := "devel"
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision" && len(s.Value) >= 12:
			version += "+" + s.Value[:12]
		case s.Key == "vcs.modified" && s.Value == "true":
			version += ".modified"
		}
	}
	return version
}

type versionInfo struct {
	Version  string            `json:"version"`
	Go       string            `json:"go"`
	Platform string            `json:"platform"`
	Protocol wire.VersionRange `json:"protocol"`
}

// VersionCommand is `version`.
func VersionCommand(out *Output) *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Show the version of this program", Args: Exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := versionInfo{BuildVersion(), runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH, wire.OwnVersions}
			if out.Format == FormatTable {
				out.Say("%s %s (%s, %s)", cmd.Root().Name(), v.Version, v.Go, v.Platform)
				return nil
			}
			return out.Print(v, Table{Columns: []string{"version", "go", "platform"}, Rows: [][]string{{v.Version, v.Go, v.Platform}}})
		},
	}
}
