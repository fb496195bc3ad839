"""The top-level keys of a cloud-config with their types.

From cloud-init's schema (config/schemas/schema-cloud-config-v1.json), versions 22.4 to 25.3. The schema itself is not used: it
has 150 KB, differs with the guest's version, and a validator's messages repeat values, which are secret.
"""

from __future__ import annotations

from collections.abc import Mapping

_LISTS = """
    bootcmd fs_setup mount_default_fields mounts packages runcmd ssh_authorized_keys ssh_fp_console_blacklist ssh_genkeytypes
    ssh_import_id ssh_key_console_blacklist write_files cloud_config_modules cloud_final_modules cloud_init_modules
"""
_MAPS = """
    ansible apk_repos apt autoinstall ca-certs ca_certs chef chpasswd device_aliases disk_setup drivers fan grub-dpkg grub_dpkg
    keyboard landscape lxd mcollective output phone_home power_state puppet random_seed reporting resolv_conf rh_subscription
    rpi_interfaces rsyslog salt_minion snap spacewalk ssh ssh_keys ssh_publish_hostkeys swap system_info ubuntu_advantage
    ubuntu_pro updates vendor_data yum_repos zypper
"""
_FLAGS = """
    allow_public_ssh_keys apt_reboot_if_required apt_update apt_upgrade create_hostname_file disable_ec2_metadata disable_piwiz
    disable_root enable_rpi_connect manage_resolv_conf migrate no_ssh_fingerprints package_reboot_if_required package_update
    package_upgrade prefer_fqdn_over_hostname preserve_hostname ssh_deletekeys ssh_quiet_keygen
"""
_TEXTS = """
    authkey_hash byobu_by_default disable_root_opts final_message fqdn hostname locale_configfile password timezone yum_repo_dir
"""

KEYS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_LISTS.split(), ("list",)),
    **dict.fromkeys(_MAPS.split(), ("map",)),
    **dict.fromkeys(_FLAGS.split(), ("bool",)),
    **dict.fromkeys(_TEXTS.split(), ("str",)),
    "apt_pipelining": ("bool", "int", "str"),
    "groups": ("list", "map", "str"),
    "growpart": ("map", "bool"),
    "launch-index": ("int",),
    "locale": ("str", "bool"),
    "manage_etc_hosts": ("bool", "str"),
    "merge_how": ("str", "list", "map"),
    "merge_type": ("str", "list", "map"),
    "ntp": ("map", "null"),
    "resize_rootfs": ("bool", "str"),
    "rpi_userconf": ("map", "bool"),
    "ssh_pwauth": ("bool", "str"),
    "user": ("str", "map", "null"),
    "users": ("list", "map", "str"),
    "version": ("str",),
    "wireguard": ("map", "null"),
}
"""Key → types of its value, as `yaml_tree.Node.kind`."""
