# Completes keys, groups and values in bash:
#
#   source launch/completion.bash
#
# after `python -m sora_train.train`, `python -m sora_train.plan`, `... -m sora_train.train` under torchrun, and the launch
# scripts. Hydra's own completion knows scripts only, not modules. Everything else after these commands is completed as
# file names, as before.

_sora_train_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

_sora_train_complete() {
    local line=${COMP_LINE:0:COMP_POINT} arguments word=${COMP_WORDS[COMP_CWORD]} choices
    COMPREPLY=()
    case $line in
        *" -m sora_train.train "*) arguments=${line##* -m sora_train.train } ;;
        *" -m sora_train.plan "*) arguments=${line##* -m sora_train.plan } ;;
        *launch/torchrun.sh\ * | *launch/multinode.sh\ *) arguments=${line##*.sh } ;;
        *launch/slurm.sbatch\ *) arguments=${line##*.sbatch } ;;
        *) return ;;
    esac
    choices=$(cd "$_sora_train_root" && COMP_LINE="train $arguments" COMP_POINT=$((6 + ${#arguments})) \
        python -m sora_train.train -sc query=bash 2>/dev/null)
    mapfile -t COMPREPLY < <(compgen -W "$choices" -- "$word")
}

# a key and its value are one word
COMP_WORDBREAKS=${COMP_WORDBREAKS//=/}
complete -o nospace -o default -F _sora_train_complete python torchrun sbatch torchrun.sh multinode.sh
