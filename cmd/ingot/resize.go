package main

import (
	"fmt"

	"github.com/spf13/cobra"

	ingotv1 "ingot/api/ingot/v1"
	"ingot/internal/env"
)

func vmResizeCommand() *cobra.Command {
	var disk, volume string
	cmd := &cobra.Command{
		Use:   "resize NAME --disk SIZE",
		Short: "Make a microVM's disk larger",
		Long: `Make a microVM's disk larger, with the ext4 file system in it: at once, also while the
microVM runs. What else is on a disk is its guest's to grow. A disk never shrinks. ` + naming,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeVMs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if disk == "" {
				return misused(cmd, "--disk is missing: the size that the disk shall have")
			}
			size, err := env.ParseMemory(disk)
			if err != nil {
				return misused(cmd, "--disk %s: %w", disk, err)
			}
			return withCloud(cmd, func(c *cloud) error {
				vm, err := c.find(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				r, err := vm.host.Resize(cmd.Context(), &ingotv1.ResizeRequest{Uid: vm.uid(), VolumeId: volume, SizeInMb: int64(size)})
				if err != nil {
					return fmt.Errorf("resize %s on %s: %w", vm, vm.host.Name, err)
				}
				fmt.Fprintln(cmd.ErrOrStderr(), pasteable(resized(vm.String(), inUnits(size), r), c.name))
				fmt.Fprintln(cmd.OutOrStdout(), vm)
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&disk, "disk", "", "size of the disk: MiB, or with a unit: 512M, 4G")
	cmd.Flags().StringVar(&volume, "volume", "", "id of another volume than the root")
	return cmd
}

// resized says what has become of a disk.
func resized(name, size string, r *ingotv1.ResizeResponse) string {
	switch {
	case r.GetLater() != "":
		return fmt.Sprintf("%s from its next start on (`ingot vm restart %s`): %s", size, name, r.GetLater())
	case r.GetMicrovm().GetStatus().GetPhase() == "running":
		return fmt.Sprintf("grown to %s; its file system follows, if that is ext4", size)
	case r.GetMicrovm().GetStatus().GetPhase() == "paused":
		return fmt.Sprintf("grown to %s; its file system follows once `ingot vm resume %s` is done, if that is ext4", size, name)
	}
	return fmt.Sprintf("grown to %s; its file system follows at the next start, if that is ext4", size)
}

func inUnits(mebibytes int32) string {
	if mebibytes%1024 == 0 {
		return fmt.Sprintf("%d GiB", mebibytes/1024)
	}
	return fmt.Sprintf("%d MiB", mebibytes)
}
